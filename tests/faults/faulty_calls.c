/* Makes the operating system fail at a chosen call. Loaded with LD_PRELOAD; armed from Python by ctypes.

   Only calls that change something under one folder are counted, in all libraries of the process
   (Python, SQLite, safetensors, torch), so the n-th of a run can be named, traced, failed or be its
   last. The real clock can be made to jump. Nothing happens before fault_arm or clock_arm is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { KILL_BEFORE = 0, KILL_AFTER = 1, KILL_TORN = 2, FAIL_ONCE = 3, FAIL_ON = 4, TERM = 5 };

static char folder[PATH_MAX];
static size_t folder_length;
static regex_t counted_names;
static int by_name;
static long counted, nth;
static int effect, error_number, trace_to = -1;
static long clock_calls, clock_nth;
static double clock_jump_s;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Counts from now on; the n-th call (1 is the first) has the effect; n = 0 only counts.
   Of FAIL_ONCE and FAIL_ON, `error` is what errno becomes, once or at every call from then on.
   `only` is an extended regular expression; other paths are not counted. NULL counts all. */
void fault_arm(const char *under, long n, int what, int error, int trace_fd, const char *only) {
  snprintf(folder, sizeof folder, "%s", under);
  folder_length = strlen(folder);
  by_name = only && !regcomp(&counted_names, only, REG_EXTENDED | REG_NOSUB);
  counted = 0, nth = n, effect = what, error_number = error, trace_to = trace_fd;
}
long fault_count(void) { return counted; }
/* From the n-th look at the real clock on it is wrong by so many seconds. */
void clock_arm(long n, double jump_s) { clock_calls = 0, clock_nth = n, clock_jump_s = jump_s; }

static int is_under(const char *path) {
  return folder_length && !strncmp(path, folder, folder_length) &&
         (path[folder_length] == '/' || !path[folder_length]);
}
static int path_of(int fd, char *into) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, into, PATH_MAX - 1);
  if (n < 0) return 0;
  into[n] = 0;
  return 1;
}
static int absolute(int dir, const char *path, char *into) {
  if (!path) return 0;
  if (path[0] == '/') return snprintf(into, PATH_MAX, "%s", path) > 0;
  char base[PATH_MAX];
  if (dir == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(dir, base)) return 0;
  return snprintf(into, PATH_MAX, "%s/%s", base, path) > 0;
}
static void die(int signum) {
  syscall(SYS_kill, getpid(), signum);
  if (signum == SIGKILL) for (;;) pause();
}
/* Whether this call shall fail; a kill that comes before it happens here. *last: kill after it. */
static int strikes(const char *operation, const char *path, int *last) {
  *last = 0;
  if (!is_under(path)) return 0;
  if (by_name && regexec(&counted_names, path + folder_length, 0, NULL, 0)) return 0;
  pthread_mutex_lock(&lock);
  long n = ++counted;
  pthread_mutex_unlock(&lock);
  if (trace_to >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", n, operation, path + folder_length);
    syscall(SYS_write, trace_to, line, length);
  }
  if (!nth || n < nth || (n > nth && effect != FAIL_ON)) return 0;
  switch (effect) {
    case KILL_BEFORE: die(SIGKILL); break;
    case TERM: die(SIGTERM); break;
    case KILL_AFTER: *last = 1; break;
    case KILL_TORN: *last = 2; break;
    default: errno = error_number; return 1;
  }
  return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define DONE(result) do { __typeof__(result) r_ = (result); int e_ = errno; if (last) die(SIGKILL); errno = e_; return r_; } while (0)
#define ON_FD(operation, fd, torn, otherwise) \
  int last = 0; char path[PATH_MAX]; \
  if (folder_length && path_of(fd, path)) { \
    if (strikes(operation, path, &last)) return -1; \
    if (last == 2) { torn; die(SIGKILL); } \
  } \
  DONE(otherwise)
#define ON_PATH(operation, dir, name, otherwise) \
  int last = 0; char path[PATH_MAX]; \
  if (folder_length && absolute(dir, name, path) && strikes(operation, path, &last)) return -1; \
  DONE(otherwise)

ssize_t write(int fd, const void *buffer, size_t n) {
  REAL(write);
  ON_FD("write", fd, real(fd, buffer, n / 2), real(fd, buffer, n));
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  REAL(writev);
  ON_FD("write", fd, real(fd, parts, 1), real(fd, parts, n));
}
ssize_t pwrite(int fd, const void *buffer, size_t n, off_t at) {
  REAL(pwrite);
  ON_FD("write", fd, real(fd, buffer, n / 2, at), real(fd, buffer, n, at));
}
ssize_t pwrite64(int fd, const void *buffer, size_t n, off64_t at) {
  REAL(pwrite64);
  ON_FD("write", fd, real(fd, buffer, n / 2, at), real(fd, buffer, n, at));
}
int fsync(int fd) { REAL(fsync); ON_FD("fsync", fd, (void)0, real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); ON_FD("fsync", fd, (void)0, real(fd)); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); ON_FD("truncate", fd, (void)0, real(fd, n)); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); ON_FD("truncate", fd, (void)0, real(fd, n)); }
int rename(const char *from, const char *to) {
  REAL(rename);
  ON_PATH("rename", AT_FDCWD, to, real(from, to));
}
int unlink(const char *name) { REAL(unlink); ON_PATH("unlink", AT_FDCWD, name, real(name)); }
int unlinkat(int dir, const char *name, int flags) {
  REAL(unlinkat);
  ON_PATH("unlink", dir, name, real(dir, name, flags));
}
int rmdir(const char *name) { REAL(rmdir); ON_PATH("rmdir", AT_FDCWD, name, real(name)); }
int mkdir(const char *name, mode_t mode) { REAL(mkdir); ON_PATH("mkdir", AT_FDCWD, name, real(name, mode)); }

#define MAKES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))
#define OPEN(name, dir, arguments, call) \
  REAL(name); \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
  if (!MAKES(flags)) return call; \
  ON_PATH("open", dir, file, call)
int open(const char *file, int flags, ...) { OPEN(open, AT_FDCWD, , real(file, flags, mode)); }
int open64(const char *file, int flags, ...) { OPEN(open64, AT_FDCWD, , real(file, flags, mode)); }
int openat(int dir, const char *file, int flags, ...) { OPEN(openat, dir, , real(dir, file, flags, mode)); }
int openat64(int dir, const char *file, int flags, ...) { OPEN(openat64, dir, , real(dir, file, flags, mode)); }

static double wrong_by_s(void) {
  return clock_nth && __sync_add_and_fetch(&clock_calls, 1) >= clock_nth ? clock_jump_s : 0.0;
}
int clock_gettime(clockid_t which, struct timespec *now) {
  REAL(clock_gettime);
  int result = real(which, now);
  if (!result && which == CLOCK_REALTIME) now->tv_sec += (time_t)wrong_by_s();
  return result;
}
int gettimeofday(struct timeval *now, void *zone) {
  REAL(gettimeofday);
  int result = real(now, zone);
  if (!result) now->tv_sec += (time_t)wrong_by_s();
  return result;
}
time_t time(time_t *into) {
  REAL(time);
  time_t now = real(0) + (time_t)wrong_by_s();
  if (into) *into = now;
  return now;
}
