// Threads: one team for all callers; in PyTorch's operators those of GNU OpenMP, where PyTorch has it.
#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>

#if defined(__linux__) && !defined(MOBILEMOE_OWN_THREADS)
#include <dlfcn.h>
#endif

#include "errors.h"
#include "isa.h"
#include "mobilemoe.h"

namespace mobilemoe {
namespace {

// Spinning, some ten microseconds, bridges the gap between two operators. Whoever waits longer waits for a thread that
// the system has stopped, and leaves it the core.
constexpr int kSpins = 1000, kYields = 4;
// Into which a phase is dealt out at most: whoever looks for work looks at all of them.
constexpr int64_t kRanges = 8;
// Callers that are helped at the same time; others work alone.
constexpr int kRegions = 4;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  // Takes about as long as x86's pause; `yield` does nothing on most cores.
  asm volatile("isb");
#endif
}

// Where one thread waits for what others do.
class Waiter {
 public:
  template <typename Ready>
  void wait(const Ready& ready) {
    for (int i = 0; i < kSpins + kYields; ++i) {
      if (ready()) return;
      if (i < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
    std::unique_lock<std::mutex> lock(mutex_);
    is_asleep_.store(true);
    called_.wait(lock, ready);
    is_asleep_.store(false);
  }

  // After what makes the thread ready. All that is sequentially consistent: either this sees that it sleeps, or it
  // sees that it need not.
  void call() {
    if (!is_asleep_.load()) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    called_.notify_one();
  }

 private:
  std::atomic<bool> is_asleep_{false};
  std::mutex mutex_;
  std::condition_variable called_;
};

// The first unit of a range; that of the next one is its end.
int64_t first_unit(int64_t range, int64_t count, int64_t num_threads) {
  const int64_t num_ranges = smaller(num_threads, kRanges);
  return range < num_ranges ? ceil_div(range * count, num_ranges) : count;
}

// The units of a phase, dealt out in ranges: neighbours mostly lie side by side in memory, and a thread that reads on
// is faster than one that begins anew. A worker takes its own range from the front, and then what others have left.
class Units {
 public:
  // Those who have claimed a unit may read what belongs to its phase. All others may ask for no more than this.
  bool has_work_for(int64_t worker) const {
    for (const Range& range : ranges_) {
      if (has_work_for(worker, range.unclaimed.load())) return true;
    }
    return false;
  }

  // Claims a unit and returns how many are left of it and its range, or 0. `range` is where it was found.
  int64_t claim(int64_t worker, int64_t* range) {
    for (int64_t i = 0; i < kRanges; ++i) {
      *range = (worker + i) % kRanges;
      std::atomic<uint64_t>& unclaimed = ranges_[*range].unclaimed;
      uint64_t state = unclaimed.load(std::memory_order_relaxed);
      while (has_work_for(worker, state)) {
        if (unclaimed.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_relaxed)) {
          return num_units(state);
        }
      }
    }
    return 0;
  }

  // Nothing may be left of the phase before, and the last range is the last that is written.
  void open(int64_t count, int64_t num_threads) {
    for (int64_t range = 0; range < kRanges; ++range) {
      const int64_t size = first_unit(range + 1, count, num_threads) - first_unit(range, count, num_threads);
      if (size == 0) continue;
      ranges_[range].unclaimed.store(static_cast<uint64_t>(num_threads) << kCountBits | static_cast<uint64_t>(size));
    }
  }

 private:
  static constexpr int kCountBits = 48;

  // Units that nobody has claimed, and above them the number of threads that may.
  struct alignas(64) Range {
    std::atomic<uint64_t> unclaimed{0};
  };

  static int64_t num_units(uint64_t state) { return static_cast<int64_t>(state & ((uint64_t{1} << kCountBits) - 1)); }

  static bool has_work_for(int64_t worker, uint64_t state) {
    return num_units(state) > 0 && worker < static_cast<int64_t>(state >> kCountBits);
  }

  Range ranges_[kRanges];
};

// Computes a unit of an open phase: one that is `left` units from the end of its range.
void compute(const Region& region, int64_t phase, int64_t count, int64_t range, int64_t left, int64_t worker) {
  region.work(region.phases, phase, first_unit(range + 1, count, region.num_threads) - left, worker);
}

// A caller's region. It outlives the call, so that a helper that was stopped while it looked for work delays nobody.
struct Shared {
  Units units;
  alignas(64) std::atomic<int64_t> unfinished{0};
  std::atomic<bool> is_taken{false}, is_done{false};
  Region region = {};
  int64_t phase = 0, count = 0;
  Waiter caller;
};

class Team {
 public:
  // False when too many callers are helped already.
  bool run(const Region& region) {
    for (Shared& shared : regions_) {
      if (shared.is_taken.exchange(true, std::memory_order_acquire)) continue;
      start(region.num_threads);
      shared.region = region;
      shared.phase = -1;
      shared.is_done.store(false, std::memory_order_relaxed);
      open_next_phase(shared, 0);
      const auto is_done = [&] { return shared.is_done.load(); };
      while (!is_done()) {
        if (!work_on(shared, 0)) shared.caller.wait([&] { return is_done() || shared.units.has_work_for(0); });
      }
      shared.is_taken.store(false, std::memory_order_release);
      return true;
    }
    return false;
  }

 private:
  struct Helper {
    Team* team;
    int64_t index;
    Waiter waiter;
  };

  // Starts helpers that have never been asked for. Where the system refuses one, there are fewer.
  void start(int64_t num_threads) {
    if (wanted_.load(std::memory_order_relaxed) >= num_threads) return;
    std::lock_guard<std::mutex> lock(starting_);
    if (wanted_.load(std::memory_order_relaxed) >= num_threads) return;
    wanted_.store(num_threads, std::memory_order_relaxed);
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (int64_t i = num_helpers_.load(std::memory_order_relaxed) + 1; i < num_threads; ++i) {
      auto* helper = new (std::nothrow) Helper{this, i, {}};
      pthread_t thread;
      if (helper == nullptr || pthread_create(&thread, &attributes, serve, helper) != 0) {
        delete helper;
        break;
      }
      helpers_[i] = helper;
      num_helpers_.store(i, std::memory_order_release);
    }
    pthread_attr_destroy(&attributes);
  }

  static void* serve(void* data) {
    Helper& self = *static_cast<Helper*>(data);
    Team& team = *self.team;
    const auto find = [&] {
      for (Shared& shared : team.regions_) {
        if (shared.units.has_work_for(self.index)) return &shared;
      }
      return static_cast<Shared*>(nullptr);
    };
    while (true) {
      if (Shared* shared = find()) {
        team.work_on(*shared, self.index);
      } else {
        self.waiter.wait([&] { return find() != nullptr; });
      }
    }
    return nullptr;
  }

  // Claims and computes one unit, if there is one.
  bool work_on(Shared& shared, int64_t worker) {
    int64_t range;
    const int64_t left = shared.units.claim(worker, &range);
    if (left == 0) return false;
    compute(shared.region, shared.phase, shared.count, range, left, worker);
    if (shared.unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) open_next_phase(shared, worker);
    return true;
  }

  void open_next_phase(Shared& shared, int64_t worker) {
    const Region& region = shared.region;
    shared.count = 0;
    while (shared.count == 0 && ++shared.phase < region.num_phases) {
      shared.count = region.count(region.phases, shared.phase);
    }
    if (shared.count == 0) {
      shared.is_done.store(true);
      // The caller may be gone already, but not its waiter.
      if (worker != 0) shared.caller.call();
      return;
    }
    // Whoever opened the phase takes one unit.
    const int64_t num_helpers = num_helpers_.load(std::memory_order_acquire), num_others = shared.count - 1;
    int64_t last = region.num_threads - 1 < num_helpers ? region.num_threads - 1 : num_helpers;
    if (last > num_others) last = num_others;
    shared.unfinished.store(shared.count, std::memory_order_relaxed);
    shared.units.open(shared.count, region.num_threads);
    // From here on the region may be over at any time.
    if (worker != 0 && num_others > 0) shared.caller.call();
    for (int64_t i = 1; i <= last; ++i) {
      if (i != worker) helpers_[i]->waiter.call();
    }
  }

  Shared regions_[kRegions];
  std::mutex starting_;
  std::atomic<int64_t> wanted_{1}, num_helpers_{0};
  Helper* helpers_[kMaxThreads] = {};
};

// Never destroyed: its helpers run until the process ends.
std::atomic<Team*> current{nullptr};
std::atomic<bool> is_child_of_fork{false};

// A child of fork has none of the threads, and perhaps locks that one of them held: it begins with a new team. Those of
// OpenMP are gone too, and a region of it would wait for them.
[[maybe_unused]] const int is_registered = pthread_atfork(nullptr, nullptr, [] {
  current.store(nullptr);
  is_child_of_fork.store(true);
});

// Null where there is no memory.
Team* team() {
  if (Team* found = current.load(std::memory_order_acquire)) return found;
  auto* made = new (std::nothrow) Team;
  Team* expected = nullptr;
  if (made == nullptr || current.compare_exchange_strong(expected, made)) return made;
  delete made;
  return expected;
}

// The entry point of libgomp behind a compiler's `#pragma omp parallel`; null where the process has no GNU OpenMP, or
// what it runs should not depend on it.
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

OpenMpParallel openmp_parallel() {
#if defined(__linux__) && !defined(MOBILEMOE_OWN_THREADS)
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// A region on the threads of GNU OpenMP, which PyTorch's operators between ours leave spinning. Beside them a team of
// our own is slower: with two threads on two cores a token of S took a quarter longer. OpenMP joins its threads, so
// all of this lies on a stack.
class OpenMpRegion {
 public:
  explicit OpenMpRegion(const Region& region) : region_(region) {}

  void run() {
    open_next_phase();
    openmp_parallel()([](void* data) { static_cast<OpenMpRegion*>(data)->work(); }, this,
                      static_cast<unsigned>(region_.num_threads), 0);
  }

 private:
  void work() {
    const int64_t worker = num_workers_.fetch_add(1, std::memory_order_relaxed);
    int waited = 0;
    while (!is_done_.load(std::memory_order_acquire)) {
      int64_t range;
      const int64_t left = units_.claim(worker, &range);
      if (left == 0) {
        if (++waited < kSpins) {
          pause();
        } else {
          sched_yield();
        }
        continue;
      }
      waited = 0;
      // Nobody opens the next phase while this unit is unfinished.
      compute(region_, phase_, count_, range, left, worker);
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) open_next_phase();
    }
  }

  void open_next_phase() {
    count_ = 0;
    while (count_ == 0 && ++phase_ < region_.num_phases) count_ = region_.count(region_.phases, phase_);
    if (count_ == 0) {
      is_done_.store(true, std::memory_order_release);
      return;
    }
    unfinished_.store(count_, std::memory_order_relaxed);
    units_.open(count_, region_.num_threads);
  }

  const Region& region_;
  int64_t phase_ = -1, count_ = 0;
  Units units_;
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<int64_t> num_workers_{0};
  std::atomic<bool> is_done_{false};
};

}  // namespace

int check_threads(int64_t num_threads) {
  if (num_threads >= 1 && num_threads <= kMaxThreads) return MOBILEMOE_OK;
  return fail("num_threads=%lld is not between 1 and %lld", (long long)num_threads, (long long)kMaxThreads);
}

void run_region(const Region& region) {
  if (region.num_threads > 1 && openmp_parallel() != nullptr && !is_child_of_fork.load(std::memory_order_relaxed)) {
    OpenMpRegion(region).run();
    return;
  }
  if (region.num_threads > 1) {
    Team* shared = team();
    if (shared != nullptr && shared->run(region)) return;
  }
  for (int64_t phase = 0; phase < region.num_phases; ++phase) {
    const int64_t count = region.count(region.phases, phase);
    for (int64_t unit = 0; unit < count; ++unit) region.work(region.phases, phase, unit, 0);
  }
}

}  // namespace mobilemoe
