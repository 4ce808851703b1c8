"""Networks, one file each, and the packed layers they are built from."""
