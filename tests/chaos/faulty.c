/* Between a process and its disk, and its clock. Dormant until armed; then it counts what a process does to files
 * below a folder (opens for writing, writes, flushes, renames, removals ...), and from one of these
 * calls on something is wrong. Loaded by LD_PRELOAD, armed after a fork. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, INPUT_OUTPUT, SHORT, READ_ONLY, CLOCK_BACK };
enum { HOUR = 3600 };
static int fault = NONE;
static long first = -1, calls;
static char root[4096];

void faulty_arm(int kind, long at, const char *folder) {
    fault = kind;
    first = at;
    calls = 0;
    snprintf(root, sizeof root, "%s", folder);
}

long faulty_calls(void) { return calls; }

static int below(const char *path) { return path && root[0] && !strncmp(path, root, strlen(root)); }

static int of(int fd) {
    char link[64], path[4096];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Whether this call fails, with errno set. A bad sector fails once, a folder stays read-only. */
static int fails(int ours, int flushes) {
    if (!ours) return 0;
    long now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (first < 0 || now < first) return 0;
    if (fault == READ_ONLY) return errno = EROFS, 1;
    if (fault == INPUT_OUTPUT && flushes) return first = -1, errno = EIO, 1;
    return 0;
}

static size_t part(int ours, size_t n) {
    return ours && fault == SHORT && first >= 0 && calls >= first && n > 1 ? n / 2 : n;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    if (!root[0]) return real(fd, data, n);
    int ours = of(fd);
    return fails(ours, 1) ? -1 : real(fd, data, part(ours, n));
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    REAL(pwrite);
    int ours = of(fd);
    return fails(ours, 1) ? -1 : real(fd, data, part(ours, n), at);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    REAL(pwrite64);
    int ours = of(fd);
    return fails(ours, 1) ? -1 : real(fd, data, part(ours, n), at);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    return fails(of(fd), 1) ? -1 : real(fd, parts, n);
}
int fsync(int fd) {
    REAL(fsync);
    return fails(of(fd), 1) ? -1 : real(fd);
}
int ftruncate64(int fd, off64_t n) {
    REAL(ftruncate64);
    return fails(of(fd), 0) ? -1 : real(fd, n);
}

#define WRITES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(rest, int) : 0; \
        va_end(rest); \
        return flags & WRITES && fails(below(path), 0) ? -1 : real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return fails(below(path), 0) ? -1 : real(path, mode);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return fails(below(to), 0) ? -1 : real(from, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    return fails(below(to), 0) ? -1 : real(from, to);
}
int unlink(const char *path) {
    REAL(unlink);
    return fails(below(path), 0) ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return fails(below(path) || of(folder), 0) ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir);
    return fails(below(path), 0) ? -1 : real(path);
}

/* Of the day, not of the kernel: what files are stamped with goes on. */
static int back(void) { return fault == CLOCK_BACK && first >= 0 && calls >= first; }

int clock_gettime(clockid_t which, struct timespec *now) {
    REAL(clock_gettime);
    int status = real(which, now);
    if (which == CLOCK_REALTIME && back()) now->tv_sec -= HOUR;
    return status;
}
time_t time(time_t *now) {
    REAL(time);
    time_t found = real(NULL) - (back() ? HOUR : 0);
    if (now) *now = found;
    return found;
}
int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int status = real(now, zone);
    if (back()) now->tv_sec -= HOUR;
    return status;
}
