/*
 * Preloaded into a daemon: writes down, in order, everything that it does to files below CRASH_ROOT, so that a test can work out what
 * a machine that lost power would find on its disk; and kills the daemon right before the Nth of those steps.
 *
 *   CRASH_ROOT      folder that is watched (absolute)
 *   CRASH_LOG       file that records are appended to (struct record, then paths and data)
 *   CRASH_BOOT_ID   file that is read instead of the machine's boot id
 *   CRASH_SYNC_US   longest time that a sync takes longer than it would
 *
 * Opening /dev/blockferry-crash/N arms it at run time: the Nth step from then on is the last; N = 0: none is. Opening
 * /dev/blockferry-crash/step is itself a step. A step is whatever changes files or makes changes durable. What is not known here
 * (a vectored write, a link) must not be used on a watched file: the process ends with a message then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FDS_MAX 65536
#define MAGIC 0x31435242 /* "BRC1" */

enum kind { OPENED = 1, CLOSED, ENDED, WRITE, PWRITE, TRUNCATE, FALLOCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, CREATE, ARMED, MARK };

struct record {
  uint32_t magic, kind;
  uint32_t id; /* of a step; ENDED carries its step's */
  int32_t fd, result, flags;
  uint64_t offset, length;
  uint32_t path_bytes, path2_bytes, data_bytes, unused;
};

static const char *root;
static size_t root_bytes;
static int log_fd = -1;
static unsigned char tracked[FDS_MAX];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint32_t steps;
static long die_at = -1; /* in terms of `steps` */
static unsigned sync_us;

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void fatal(const char *what) {
  dprintf(2, "preload: %s on a watched file\n", what);
  _exit(97);
}

__attribute__((constructor)) static void start(void) {
  const char *path = getenv("CRASH_LOG");
  root = getenv("CRASH_ROOT");
  if (!path || !root) {
    root = NULL;
    return;
  }
  root_bytes = strlen(root);
  log_fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  if (getenv("CRASH_SYNC_US")) sync_us = (unsigned)atoi(getenv("CRASH_SYNC_US"));
}

static int watches(const char *path) {
  return root && strncmp(path, root, root_bytes) == 0 && (path[root_bytes] == '/' || path[root_bytes] == 0);
}

static int is_tracked(int fd) { return fd >= 0 && fd < FDS_MAX && tracked[fd]; }

/* With the mutex held. */
static void append(struct record *r, const char *path, const char *path2, const void *data) {
  r->magic = MAGIC;
  r->path_bytes = path ? (uint32_t)strlen(path) : 0;
  r->path2_bytes = path2 ? (uint32_t)strlen(path2) : 0;
  struct iovec parts[4] = {{r, sizeof *r},
                           {(void *)path, r->path_bytes},
                           {(void *)path2, r->path2_bytes},
                           {(void *)data, r->data_bytes}};
  const ssize_t size = (ssize_t)(sizeof *r + r->path_bytes + r->path2_bytes + r->data_bytes);
  if (syscall(SYS_writev, log_fd, parts, 4) != size) fatal("the log is full: a step");
}

/* A step begins: it is written down, or the process dies before it. */
static uint32_t begin(struct record *r, const char *path, const char *path2, const void *data) {
  pthread_mutex_lock(&mutex);
  if (die_at >= 0 && (long)steps + 1 >= die_at) {
    syscall(SYS_kill, getpid(), 9);
    for (;;) pause();
  }
  r->id = ++steps;
  append(r, path, path2, data);
  pthread_mutex_unlock(&mutex);
  return r->id;
}

static void end(uint32_t id, long result) {
  struct record r = {.kind = ENDED, .id = id, .result = result < 0 ? -1 : 0};
  const int saved = errno;
  pthread_mutex_lock(&mutex);
  append(&r, NULL, NULL, NULL);
  pthread_mutex_unlock(&mutex);
  errno = saved;
}

static void arm(const char *what) {
  struct record r = {.kind = strcmp(what, "step") == 0 ? MARK : ARMED};
  if (r.kind == MARK) {
    end(begin(&r, NULL, NULL, NULL), 0);
    return;
  }
  pthread_mutex_lock(&mutex);
  const long n = atol(what);
  die_at = n == 0 ? -1 : (long)steps + n;
  r.id = steps;
  append(&r, NULL, NULL, NULL);
  pthread_mutex_unlock(&mutex);
}

int open64(const char *path, int flags, ...) {
  REAL(open64);
  mode_t mode = 0;
  if (flags & (O_CREAT | O_TMPFILE)) {
    va_list list;
    va_start(list, flags);
    mode = va_arg(list, mode_t);
    va_end(list);
  }
  const char *boot = getenv("CRASH_BOOT_ID");
  if (boot && strcmp(path, "/proc/sys/kernel/random/boot_id") == 0) path = boot;
  if (!root) return real(path, flags, mode);
  if (strncmp(path, "/dev/blockferry-crash/", 22) == 0) {
    arm(path + 22);
    errno = ENOENT;
    return -1;
  }
  if (!watches(path)) {
    const int fd = real(path, flags, mode);
    if (fd >= 0 && fd < FDS_MAX) tracked[fd] = 0;
    return fd;
  }
  uint32_t id = 0;
  struct record step = {.kind = CREATE, .flags = flags & O_TRUNC ? 1 : 0};
  struct stat st;
  if ((flags & O_CREAT && stat(path, &st) != 0) || flags & O_TRUNC) id = begin(&step, path, NULL, NULL);
  const int fd = real(path, flags, mode);
  const int saved = errno;
  if (id) end(id, fd);
  if (fd >= 0) {
    if (fd >= FDS_MAX || flags & O_APPEND || (flags & O_TMPFILE) == O_TMPFILE) fatal("an unknown way to open");
    struct record r = {.kind = OPENED, .fd = fd};
    pthread_mutex_lock(&mutex);
    tracked[fd] = 1;
    append(&r, path, NULL, NULL);
    pthread_mutex_unlock(&mutex);
  }
  errno = saved;
  return fd;
}

int open(const char *path, int flags, ...) {
  mode_t mode = 0;
  if (flags & (O_CREAT | O_TMPFILE)) {
    va_list list;
    va_start(list, flags);
    mode = va_arg(list, mode_t);
    va_end(list);
  }
  return open64(path, flags, mode);
}

static void closing(int fd) {
  if (!is_tracked(fd)) return;
  struct record r = {.kind = CLOSED, .fd = fd};
  pthread_mutex_lock(&mutex);
  tracked[fd] = 0;
  append(&r, NULL, NULL, NULL);
  pthread_mutex_unlock(&mutex);
}

int close(int fd) {
  REAL(close);
  closing(fd);
  return real(fd);
}

/* libuv closes files by the system call's number. */
long syscall(long number, ...) {
  REAL(syscall);
  long a[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
  va_end(list);
  if (number == SYS_close) closing((int)a[0]);
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

ssize_t write(int fd, const void *data, size_t length) {
  REAL(write);
  if (!is_tracked(fd)) return real(fd, data, length);
  struct record r = {.kind = WRITE, .fd = fd, .length = length, .data_bytes = (uint32_t)length};
  const uint32_t id = begin(&r, NULL, NULL, data);
  const ssize_t done = real(fd, data, length);
  if (done >= 0 && (size_t)done != length) fatal("a short write");
  end(id, done);
  return done;
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
  REAL(pwrite64);
  if (!is_tracked(fd)) return real(fd, data, length, offset);
  struct record r = {
      .kind = PWRITE, .fd = fd, .offset = (uint64_t)offset, .length = length, .data_bytes = (uint32_t)length};
  const uint32_t id = begin(&r, NULL, NULL, data);
  const ssize_t done = real(fd, data, length, offset);
  if (done >= 0 && (size_t)done != length) fatal("a short write");
  end(id, done);
  return done;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return pwrite64(fd, data, length, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  if (is_tracked(fd)) fatal("writev");
  return real(fd, parts, count);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
  REAL(pwritev64);
  if (is_tracked(fd)) fatal("pwritev");
  return real(fd, parts, count, offset);
}

int ftruncate64(int fd, off64_t length) {
  REAL(ftruncate64);
  if (!is_tracked(fd)) return real(fd, length);
  struct record r = {.kind = TRUNCATE, .fd = fd, .length = (uint64_t)length};
  const uint32_t id = begin(&r, NULL, NULL, NULL);
  const int done = real(fd, length);
  end(id, done);
  return done;
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

int fallocate64(int fd, int mode, off64_t offset, off64_t length) {
  REAL(fallocate64);
  if (!is_tracked(fd)) return real(fd, mode, offset, length);
  struct record r = {
      .kind = FALLOCATE, .fd = fd, .flags = mode, .offset = (uint64_t)offset, .length = (uint64_t)length};
  const uint32_t id = begin(&r, NULL, NULL, NULL);
  const int done = real(fd, mode, offset, length);
  end(id, done);
  return done;
}

int fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate64(fd, mode, offset, length); }

static void dawdle(void) {
  if (sync_us == 0) return;
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  usleep((useconds_t)((uint64_t)now.tv_nsec * 2654435761u % sync_us) / 2);
}

static int sync_file(int fd, int (*real)(int)) {
  if (!is_tracked(fd)) return real(fd);
  struct record r = {.kind = SYNC, .fd = fd};
  const uint32_t id = begin(&r, NULL, NULL, NULL);
  dawdle();
  const int done = real(fd);
  dawdle();
  end(id, done);
  return done;
}

int fsync(int fd) {
  REAL(fsync);
  return sync_file(fd, real);
}

int fdatasync(int fd) {
  REAL(fdatasync);
  return sync_file(fd, real);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  if (!watches(from) && !watches(to)) return real(from, to);
  struct record r = {.kind = RENAME};
  const uint32_t id = begin(&r, from, to, NULL);
  const int done = real(from, to);
  end(id, done);
  return done;
}

int link(const char *from, const char *to) {
  REAL(link);
  if (watches(from) || watches(to)) fatal("link");
  return real(from, to);
}

#define PATH_STEP(name, kind_, parameters, arguments) \
  int name parameters { \
    REAL(name); \
    if (!watches(path)) return real arguments; \
    struct record r = {.kind = kind_}; \
    const uint32_t id = begin(&r, path, NULL, NULL); \
    const int done = real arguments; \
    end(id, done); \
    return done; \
  }

PATH_STEP(unlink, UNLINK, (const char *path), (path))
PATH_STEP(rmdir, RMDIR, (const char *path), (path))
PATH_STEP(mkdir, MKDIR, (const char *path, mode_t mode), (path, mode))
