/* Loaded into a process by LD_PRELOAD: counts its system calls that write, sync, rename, connect, send or receive, ends or
 * stops it before the call of a number, or lets that call fail, and records what it does to files. Of files, only those
 * below PROOF_FOLDER count; of sockets, those of the network, and those that have a name.
 *
 * PROOF_CONTROL is a file that all processes of a scenario share: see `struct control`. PROOF_RECORD, if it is set, gets
 * one record for each call: see `struct record`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* A signal of -1 or -2 is an error, the first or second one of the call; with -3 or -4, all calls for files fail for a
 * second. It becomes 0 if the call is one of the network. */
struct control { int64_t count, at, signal, pid, time; };
struct record { char what; char pad[7]; int64_t file, offset, size, name, data; };

static struct control *control;
static int record_fd = -1;
static char folder[PATH_MAX];

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("PROOF_CONTROL"), *record = getenv("PROOF_RECORD"), *root = getenv("PROOF_FOLDER");
    if (!path || !root) return;
    strncpy(folder, root, sizeof folder - 1);
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) control = at;
    if (record) record_fd = syscall(SYS_openat, AT_FDCWD, record, O_WRONLY | O_APPEND | O_CLOEXEC);
}

/* For a process that was forked with other variables than its parent. */
void proof_begin(void) { begin(); }

#define LASTS_NS 1000000000ll

static int fails(int error, int other) { /* or ends or stops the process */
    if (!control) return 0;
    int signal = control->signal, is_file = error == ENOSPC || error == EIO || error == EACCES;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int64_t time = now.tv_sec * 1000000000ll + now.tv_nsec;
    if (__atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST) == control->at) {
        control->time = time;
        if (signal < 0 && !is_file) control->signal = 0;
        __atomic_store_n(&control->pid, getpid(), __ATOMIC_SEQ_CST);
        if (signal > 0) kill(getpid(), signal);
    } else if (!control->pid || signal > -3 || !is_file || time - control->time > LASTS_NS) {
        return 0;
    }
    if (signal < 0) errno = signal & 1 ? error : other;
    return signal < 0;
}

static int is_ours(const char *path) { return control && !strncmp(path, folder, strlen(folder)); }

static int name_of(int fd, char *path) { /* "" if it is not a file below the folder */
    char link[40] = "/proc/self/fd/";
    int n = fd, digits = 1, end = strlen(link);
    while (n >= 10) n /= 10, digits++;
    for (n = fd, link[end + digits] = 0; digits; n /= 10) link[end + --digits] = '0' + n % 10;
    ssize_t size = control ? readlink(link, path, PATH_MAX - 1) : -1;
    path[size < 0 ? 0 : size] = 0;
    return is_ours(path) && !strstr(path, "-shm");
}

static int64_t inode(int fd) {
    struct stat s;
    return fstat(fd, &s) ? 0 : (int64_t)s.st_ino;
}

static void record(char what, int64_t file, const char *name, int64_t offset, const void *data, size_t size, const char *to) {
    if (record_fd < 0) return;
    struct record head = {what, {0}, file, offset, size, strlen(name), to ? strlen(to) : data ? size : 0};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)name, head.name}, {to ? (void *)to : (void *)data, head.data}};
    syscall(SYS_writev, record_fd, parts, 3);
}

static int is_network(int fd) {
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    struct stat s;
    if (!control || fstat(fd, &s) || !S_ISSOCK(s.st_mode)) return 0;
    if (getsockname(fd, (struct sockaddr *)&address, &size)) return 0;
    if (address.ss_family != AF_UNIX || size > sizeof(sa_family_t)) return 1;
    size = sizeof address;
    return !getpeername(fd, (struct sockaddr *)&address, &size) && size > sizeof(sa_family_t);
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, name)

/* Writes */

static int written(int fd, const void *data, size_t size, int64_t offset) {
    char path[PATH_MAX];
    if (!name_of(fd, path)) return !is_network(fd) || !fails(EPIPE, ECONNRESET);
    if (fails(ENOSPC, EIO)) return 0;
    record('w', inode(fd), path, offset, data, size, NULL);
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return written(fd, data, size, control ? lseek(fd, 0, SEEK_CUR) : 0) ? real(fd, data, size) : -1;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    return written(fd, data, size, offset) ? real(fd, data, size, offset) : -1;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return is_network(fd) && fails(EPIPE, ECONNRESET) ? -1 : real(fd, parts, n);
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    char path[PATH_MAX];
    if (name_of(fd, path)) {
        if (fails(ENOSPC, EIO)) return -1;
        record('t', inode(fd), path, size, NULL, 0, NULL);
    }
    return real(fd, size);
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

/* Syncs: what was written before the record 's' is on disk at the record 'S' of the same thread. */

static int synced(int fd, int (*real)(int)) {
    char path[PATH_MAX];
    int is_file = name_of(fd, path);
    if (is_file && fails(EIO, ENOSPC)) return -1;
    if (is_file) record('s', inode(fd), path, gettid(), NULL, 0, NULL);
    int result = real(fd);
    if (is_file && !result) record('S', inode(fd), path, gettid(), NULL, 0, NULL);
    return result;
}

int fsync(int fd) { REAL(int, "fsync", int); return synced(fd, real); }
int fdatasync(int fd) { REAL(int, "fdatasync", int); return synced(fd, real); }

void sync(void) {
    REAL(void, "sync", void);
    real();
    record('Y', 0, "", 0, NULL, 0, NULL);
}

/* Names */

static int opened(const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int is_new = (flags & O_CREAT) && control && access(path, F_OK);
    int fd = syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (fd < 0 || !(is_new || flags & O_TRUNC) || !name_of(fd, full)) return fd;
    if (fails(EACCES, EIO)) {
        syscall(SYS_close, fd);
        if (is_new) syscall(SYS_unlinkat, AT_FDCWD, path, 0);
        return -1;
    }
    record(is_new ? 'c' : 't', inode(fd), full, 0, NULL, 0, NULL);
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        return opened(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (is_ours(from)) {
        if (fails(EACCES, EIO)) return -1;
        record('r', 0, from, 0, NULL, 0, to);
    }
    return real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    int result = real(path, mode);
    char full[PATH_MAX];
    if (!result && control && realpath(path, full) && is_ours(full)) {
        if (fails(ENOSPC, EIO)) {
            syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
            return -1;
        }
        record('m', 0, full, 0, NULL, 0, NULL);
    }
    return result;
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (is_ours(path) && !strstr(path, "-shm")) {
        if (fails(EACCES, EIO)) return -1;
        record('u', 0, path, 0, NULL, 0, NULL);
    }
    return real(path);
}

/* The network */

#define COUNTED(result, name, parameters, types, arguments, error, other) \
    result name parameters { \
        REAL(result, #name, types); \
        return is_network(fd) && fails(error, other) ? -1 : real arguments; \
    }
#define LIST(...) __VA_ARGS__
COUNTED(ssize_t, read, (int fd, void *data, size_t size), LIST(int, void *, size_t), (fd, data, size), ECONNRESET, ETIMEDOUT)
COUNTED(ssize_t, send, (int fd, const void *data, size_t size, int flags), LIST(int, const void *, size_t, int), (fd, data, size, flags), EPIPE, ECONNRESET)
COUNTED(ssize_t, sendmsg, (int fd, const struct msghdr *m, int flags), LIST(int, const struct msghdr *, int), (fd, m, flags), EPIPE, ECONNRESET)
COUNTED(ssize_t, recv, (int fd, void *data, size_t size, int flags), LIST(int, void *, size_t, int), (fd, data, size, flags), ECONNRESET, ETIMEDOUT)
COUNTED(ssize_t, recvmsg, (int fd, struct msghdr *m, int flags), LIST(int, struct msghdr *, int), (fd, m, flags), ECONNRESET, ETIMEDOUT)
COUNTED(int, connect, (int fd, const struct sockaddr *to, socklen_t size), LIST(int, const struct sockaddr *, socklen_t), (fd, to, size), ECONNREFUSED, EADDRNOTAVAIL)

int accept4(int fd, struct sockaddr *from, socklen_t *size, int flags) {
    REAL(int, "accept4", int, struct sockaddr *, socklen_t *, int);
    int accepted = real(fd, from, size, flags);
    if (accepted < 0 || !is_network(accepted) || !fails(EMFILE, ECONNABORTED)) return accepted;
    int error = errno;
    syscall(SYS_close, accepted);
    errno = error;
    return -1;
}
