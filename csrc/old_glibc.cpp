// libstdc++ reads this flag of glibc 2.32 to skip atomic operations in programs of one thread. A hidden one of our own,
// always "there may be threads", keeps the module loadable on older systems and is correct everywhere.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
