// Work shared out among threads that never wait for one that has not begun.
//
// A computation is a sequence of phases, and a phase a number of units. A unit belongs to whoever claims it, and
// whoever finishes the last one of a phase opens the next phase. So a thread waits only for units that a running
// thread has claimed: one that wakes late joins in the middle, and one that never wakes is not missed.
#pragma once

#include <cstdint>

namespace mobilemoe {

constexpr int64_t kMaxThreads = 1024;
// Bytes of weights in a unit, at least: a microsecond, little to lose when a thread is stopped.
constexpr int64_t kUnitBytes = 8 * 1024;

// A status with a sentence, as errors.h.
int check_threads(int64_t num_threads);

// Units that do not depend on each other, but on all of the phase before. `count()` is asked when that phase is done.
// In `work(unit, worker)`, `worker` < num_threads names scratch memory.
template <typename Count, typename Work>
struct Phase {
  Count count;
  Work work;

  Phase(const Count& c, const Work& w) : count(c), work(w) {}
};

// Phases without their types.
struct Region {
  void* phases;
  int64_t num_phases, num_threads;
  int64_t (*count)(void* phases, int64_t phase);
  void (*work)(void* phases, int64_t phase, int64_t unit, int64_t worker);
};

// Runs phases in order on the calling thread and up to num_threads - 1 others, which the process keeps.
void run_region(const Region& region);

template <typename... Phases>
void run_phases(int64_t num_threads, const Phases&... phases) {
  const auto count = [&](int64_t phase) {
    int64_t i = 0, found = 0;
    ((i++ == phase ? void(found = phases.count()) : void()), ...);
    return found;
  };
  const auto work = [&](int64_t phase, int64_t unit, int64_t worker) {
    int64_t i = 0;
    ((i++ == phase ? void(phases.work(unit, worker)) : void()), ...);
  };
  struct Both {
    decltype(count)& of_count;
    decltype(work)& of_work;
  } both{count, work};
  run_region({&both, sizeof...(Phases), num_threads,
              [](void* data, int64_t phase) { return static_cast<Both*>(data)->of_count(phase); },
              [](void* data, int64_t phase, int64_t unit, int64_t worker) {
                static_cast<Both*>(data)->of_work(phase, unit, worker);
              }});
}

}  // namespace mobilemoe
