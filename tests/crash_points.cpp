// Preloaded by crash_worker.py: counts the operations that change files below one directory, whoever calls them, and
// ends the process before one of them, as SIGKILL would: nothing is cleaned up.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

char root[4096];
long counted = 0, last = 0;

void count(const char* path) {
  if (root[0] == 0 || strncmp(path, root, strlen(root)) != 0) return;
  if (++counted == last) syscall(SYS_exit_group, 137);
}

void count_descriptor(int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  if (length <= 0) return;
  path[length] = 0;
  count(path);
}

void count_at(int directory, const char* path) {
  if (path[0] == '/') return count(path);
  if (directory != AT_FDCWD) return count_descriptor(directory);
  char absolute[4096];
  if (getcwd(absolute, sizeof(absolute)) != nullptr) count(absolute);
}

bool changes(int flags) { return (flags & (O_CREAT | O_TRUNC)) != 0; }

}  // namespace

extern "C" {

void crash_at(const char* directory, long operation) {
  counted = 0;
  last = operation;
  snprintf(root, sizeof(root), "%s", directory);
}

long crash_count() { return counted; }

#define ORIGINAL(name) static const auto original = reinterpret_cast<decltype(&name)>(dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                     \
  int name(const char* path, int flags, ...) {                         \
    ORIGINAL(name);                                                    \
    va_list arguments;                                                 \
    va_start(arguments, flags);                                        \
    const int mode = (flags & O_CREAT) ? va_arg(arguments, int) : 0;   \
    va_end(arguments);                                                 \
    if (changes(flags)) count_at(AT_FDCWD, path);                      \
    return original(path, flags, mode);                                \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                   \
  int name(int directory, const char* path, int flags, ...) {          \
    ORIGINAL(name);                                                    \
    va_list arguments;                                                 \
    va_start(arguments, flags);                                        \
    const int mode = (flags & O_CREAT) ? va_arg(arguments, int) : 0;   \
    va_end(arguments);                                                 \
    if (changes(flags)) count_at(directory, path);                     \
    return original(directory, path, flags, mode);                     \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                     \
  FILE* name(const char* path, const char* mode) {      \
    ORIGINAL(name);                                     \
    if (mode[0] != 'r') count_at(AT_FDCWD, path);       \
    return original(path, mode);                        \
  }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int descriptor, const void* data, size_t size) {
  ORIGINAL(write);
  count_descriptor(descriptor);
  return original(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec* parts, int num_parts) {
  ORIGINAL(writev);
  count_descriptor(descriptor);
  return original(descriptor, parts, num_parts);
}

ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t offset) {
  ORIGINAL(pwrite64);
  count_descriptor(descriptor);
  return original(descriptor, data, size, offset);
}

int ftruncate64(int descriptor, off64_t size) {
  ORIGINAL(ftruncate64);
  count_descriptor(descriptor);
  return original(descriptor, size);
}

ssize_t sendfile(int to, int from, off_t* offset, size_t size) {
  static const auto original =
      reinterpret_cast<ssize_t (*)(int, int, off_t*, size_t)>(dlsym(RTLD_NEXT, "sendfile"));
  count_descriptor(to);
  return original(to, from, offset, size);
}

int rename(const char* from, const char* to) {
  ORIGINAL(rename);
  count_at(AT_FDCWD, to);
  return original(from, to);
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) {
  ORIGINAL(renameat);
  count_at(to_directory, to);
  return original(from_directory, from, to_directory, to);
}

int link(const char* from, const char* to) {
  ORIGINAL(link);
  count_at(AT_FDCWD, to);
  return original(from, to);
}

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) {
  ORIGINAL(linkat);
  count_at(to_directory, to);
  return original(from_directory, from, to_directory, to, flags);
}

int unlink(const char* path) {
  ORIGINAL(unlink);
  count_at(AT_FDCWD, path);
  return original(path);
}

int unlinkat(int directory, const char* path, int flags) {
  ORIGINAL(unlinkat);
  count_at(directory, path);
  return original(directory, path, flags);
}

int mkdir(const char* path, mode_t mode) {
  ORIGINAL(mkdir);
  count_at(AT_FDCWD, path);
  return original(path, mode);
}

int rmdir(const char* path) {
  ORIGINAL(rmdir);
  count_at(AT_FDCWD, path);
  return original(path);
}

int chmod(const char* path, mode_t mode) {
  ORIGINAL(chmod);
  count_at(AT_FDCWD, path);
  return original(path, mode);
}

}  // extern "C"
