/* Lets the file system calls of a program fail, as those of a broken disk or network file system do.
 *
 *     cc -shared -fPIC -o failing.so failing_calls.c -ldl
 *     LD_PRELOAD=./failing.so FAIL_BELOW=/folder FAIL_CALL=rename FAIL_AFTER=3 FAIL_ERRNO=5 FAIL_TIMES=1 program
 *
 * Calls that concern a path below FAIL_BELOW and belong to the group FAIL_CALL (open: for writing; read, write, rename,
 * sync, mkdir) are counted. The first FAIL_AFTER of them succeed, the next FAIL_TIMES return -1 with errno FAIL_ERRNO.
 * The first failure creates the file FAIL_MARK, which must not lie below FAIL_BELOW.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_long calls;

static int fails(const char *group, const char *path) {
    const char *below = getenv("FAIL_BELOW"), *wanted = getenv("FAIL_CALL");
    if (!below || !wanted || strcmp(group, wanted) || !path || strncmp(path, below, strlen(below))) return 0;
    long number = atomic_fetch_add(&calls, 1), after = atol(getenv("FAIL_AFTER"));
    if (number < after || number >= after + atol(getenv("FAIL_TIMES"))) return 0;
    int mark = syscall(SYS_openat, AT_FDCWD, getenv("FAIL_MARK"), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    if (mark >= 0) syscall(SYS_close, mark);
    errno = atoi(getenv("FAIL_ERRNO"));
    return 1;
}

static int descriptor_fails(const char *group, int fd) {
    char link[64], path[PATH_MAX];
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = kept;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(group, path);
}

static const char *absolute(int directory, const char *name, char *path) {
    if (!name || name[0] == '/') return name;
    char link[64], folder[PATH_MAX];
    snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, folder, sizeof folder - 1);
    if (length < 0) return name;
    folder[length] = 0;
    if (length + strlen(name) + 2 > PATH_MAX) return name;
    strcpy(path, folder);
    strcat(path, "/");
    return strcat(path, name);
}

#define OPENS(flags) (((flags)&O_ACCMODE) != O_RDONLY || ((flags)&O_CREAT))
#define MODE(flags, mode, last)                      \
    mode_t mode = 0;                                 \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {         \
        va_list list;                                \
        va_start(list, last);                        \
        mode = va_arg(list, mode_t);                 \
        va_end(list);                                \
    }

int open(const char *name, int flags, ...) {
    char path[PATH_MAX];
    MODE(flags, mode, flags)
    if (OPENS(flags) && fails("open", absolute(AT_FDCWD, name, path))) return -1;
    return REAL(open)(name, flags, mode);
}

int open64(const char *name, int flags, ...) {
    char path[PATH_MAX];
    MODE(flags, mode, flags)
    if (OPENS(flags) && fails("open", absolute(AT_FDCWD, name, path))) return -1;
    return REAL(open64)(name, flags, mode);
}

int openat(int directory, const char *name, int flags, ...) {
    char path[PATH_MAX];
    MODE(flags, mode, flags)
    if (OPENS(flags) && fails("open", absolute(directory, name, path))) return -1;
    return REAL(openat)(directory, name, flags, mode);
}

int openat64(int directory, const char *name, int flags, ...) {
    char path[PATH_MAX];
    MODE(flags, mode, flags)
    if (OPENS(flags) && fails("open", absolute(directory, name, path))) return -1;
    return REAL(openat64)(directory, name, flags, mode);
}

#define DESCRIPTOR(type, name, group, declared, given) \
    type name declared {                               \
        if (descriptor_fails(group, fd)) return -1;    \
        return REAL(name) given;                       \
    }

DESCRIPTOR(ssize_t, write, "write", (int fd, const void *data, size_t size), (fd, data, size))
DESCRIPTOR(ssize_t, pwrite, "write", (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
DESCRIPTOR(ssize_t, pwrite64, "write", (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
DESCRIPTOR(ssize_t, writev, "write", (int fd, const struct iovec *parts, int count), (fd, parts, count))
DESCRIPTOR(ssize_t, pwritev, "write", (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
DESCRIPTOR(ssize_t, read, "read", (int fd, void *data, size_t size), (fd, data, size))
DESCRIPTOR(ssize_t, pread, "read", (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
DESCRIPTOR(ssize_t, pread64, "read", (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
DESCRIPTOR(int, fsync, "sync", (int fd), (fd))
DESCRIPTOR(int, fdatasync, "sync", (int fd), (fd))

int rename(const char *from, const char *to) {
    char path[PATH_MAX];
    if (fails("rename", absolute(AT_FDCWD, to, path))) return -1;
    return REAL(rename)(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    char path[PATH_MAX];
    if (fails("rename", absolute(b, to, path))) return -1;
    return REAL(renameat)(a, from, b, to);
}

int mkdir(const char *name, mode_t mode) {
    char path[PATH_MAX];
    if (fails("mkdir", absolute(AT_FDCWD, name, path))) return -1;
    return REAL(mkdir)(name, mode);
}
