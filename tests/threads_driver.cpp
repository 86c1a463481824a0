// Runs regions of counted units: from several callers, beside others, in children of fork, and with fewer threads than
// were asked for. Linked with -Wl,--wrap=pthread_create, which lets it refuse threads and hold them back.
//
//     threads_driver REGIONS
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

std::atomic<int> threads_to_refuse_from{1 << 20}, num_created{0};
std::atomic<bool> is_held{false}, has_begun{false};

struct Start {
  void* (*run)(void*);
  void* data;
};

void* hold(void* data) {
  const std::unique_ptr<Start> start(static_cast<Start*>(data));
  while (is_held.load()) usleep(1000);
  has_begun.store(true);
  return start->run(start->data);
}

// Three phases, the second of a length that the first decides. Every unit writes its own cell, from all of the phase
// before, in scratch memory of its worker: a race is an error of the sanitizer, a lost unit a wrong sum.
bool run_one(int64_t num_units, int64_t num_threads) {
  std::vector<int64_t> first(num_units), second(2 * num_units), scratch(num_threads * 8);
  int64_t length = 0, total = 0;
  const mobilemoe::Phase fill([&] { return num_units; },
                              [&](int64_t unit, int64_t worker) {
                                scratch[worker * 8] = unit;
                                first[unit] = scratch[worker * 8] + 1;
                              });
  const mobilemoe::Phase empty([] { return int64_t{0}; }, [](int64_t, int64_t) { std::abort(); });
  const mobilemoe::Phase twice(
      [&] {
        for (const int64_t value : first) length += value > 0 ? 2 : 0;
        return length;
      },
      [&](int64_t unit, int64_t worker) {
        int64_t& sum = scratch[worker * 8];
        sum = 0;
        for (const int64_t value : first) sum += value;
        second[unit] = sum;
      });
  const mobilemoe::Phase add([] { return int64_t{1}; },
                             [&](int64_t, int64_t) {
                               for (const int64_t value : second) total += value;
                             });
  mobilemoe::run_phases(num_threads, fill, empty, twice, add, empty);
  return total == num_units * (num_units + 1) * num_units;
}

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s failed\n", what);
  std::exit(1);
}

// In a process of its own, which begins without threads. A call that waits for ever is ended by the alarm.
template <typename Run>
void in_child(const char* what, const Run& run) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(120);
    _exit(run() ? 0 : 1);
  }
  int status = 0;
  check(child > 0 && waitpid(child, &status, 0) == child && status == 0, what);
}

bool run_many(int64_t num_regions, int64_t seed) {
  for (int64_t i = 0; i < num_regions; ++i) {
    const int64_t mixed = (i * 2654435761 + seed * 40503) >> 4;
    if (!run_one(mixed % 40, 1 + mixed / 64 % 5)) return false;
    // Long enough for helpers to fall asleep.
    if (i % 500 == 0) usleep(2000);
  }
  return true;
}

bool run_callers(int64_t num_regions, int num_callers) {
  std::atomic<bool> good{true};
  std::vector<std::thread> callers;
  for (int i = 0; i < num_callers; ++i) {
    callers.emplace_back([&, i] {
      if (!run_many(num_regions, i)) good = false;
    });
  }
  for (std::thread& caller : callers) caller.join();
  return good;
}

}  // namespace

extern "C" int __real_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

extern "C" int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                                     void* data) {
  if (num_created.fetch_add(1) >= threads_to_refuse_from.load()) return EAGAIN;
  return __real_pthread_create(thread, attributes, hold, new Start{run, data});
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const int64_t num_regions = std::atoll(argv[1]);
  in_child("a team whose threads never begin", [] {
    is_held = true;
    const bool good = run_one(30, 4) && run_one(100, 3) && !has_begun.load();
    is_held = false;
    return good;
  });
  in_child("a team of one thread where four were wanted", [&] {
    threads_to_refuse_from = 1;
    return run_many(num_regions / 10, 1) && num_created.load() > 1;
  });
  in_child("a team without threads", [&] {
    threads_to_refuse_from = 0;
    return run_many(num_regions / 10, 1);
  });
  check(run_many(num_regions, 7), "one caller");
  check(run_callers(num_regions / 4, 6), "six callers");
  std::atomic<bool> is_over{false};
  std::thread busy([&] {
    while (!is_over.load()) run_one(20, 3);
  });
  for (int i = 0; i < 5; ++i) in_child("a child of fork", [&] { return run_many(num_regions / 10, i); });
  is_over = true;
  busy.join();
  std::printf("every unit once: %lld regions\n", static_cast<long long>(num_regions));
  return 0;
}
