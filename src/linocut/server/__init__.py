"""`linocut serve`: the web studio and the HTTP API, one process on one port.

    app.py        the application: routes, guard, static files, start and stop
    jobs.py       what is asked for: jobs, their queue;  feed.py  what happens, for followers
    worker.py     draws, one thread per device;          catalogue.py  the models there are
    gallery.py    finished pictures: PNG files, found again by SQLite
    guard.py      who may ask: hosts, origins, tokens, sizes;  outgoing.py  what this process asked of the network
    *_routes.py   HTTP in and out, nothing else;         schemas.py  what goes over the wire

Needs the extra `serve`: pip install 'linocut[serve]'. Torch is imported by the workers alone, so the page is there
before the first model is.
"""
