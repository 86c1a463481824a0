// The read bandwidth of memory, which bounds decoding: threads that only read, each its own part of a buffer.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace {

// SSE2 and NEON, so this needs no instruction that a machine may lack; two such loads per cycle outrun any memory.
using Vector = uint64_t __attribute__((vector_size(16), may_alias));
constexpr size_t kUnrolled = 8;
using Clock = std::chrono::steady_clock;

Vector sum(const Vector* data, size_t count) {
  Vector sums[kUnrolled] = {};
  for (size_t i = 0; i < count; i += kUnrolled) {
    for (size_t j = 0; j < kUnrolled; ++j) sums[j] += data[i + j];
  }
  for (size_t j = 1; j < kUnrolled; ++j) sums[0] += sums[j];
  return sums[0];
}

// The n-th wait ends when every thread has waited n times.
struct Barrier {
  explicit Barrier(int threads) : threads(threads) {}
  void wait(int n) {
    arrived.fetch_add(1);
    while (arrived.load() < threads * n) std::this_thread::yield();
  }
  const int threads;
  std::atomic<int> arrived{0};
};

}  // namespace

// Bytes per second in the fastest of `passes` over `bytes` by `threads`; 0 without that much memory.
extern "C" __attribute__((visibility("default"))) double mobilemoe_read_rate(int threads, int64_t bytes, int passes) {
  const size_t part = bytes / threads / sizeof(Vector) / kUnrolled * kUnrolled;
  const size_t size = part * threads * sizeof(Vector);
  const std::unique_ptr<char[]> data(new (std::nothrow) char[size]);
  if (!data) return 0;
  Barrier barrier(threads);
  std::vector<Clock::time_point> arrived(threads), finished(threads);
  std::atomic<uint64_t> total{0};
  double fastest = 0;
  const auto work = [&](int thread) {
    Vector* mine = reinterpret_cast<Vector*>(data.get()) + part * thread;
    // A page that was never written is the system's page of zeros, which is always in the cache.
    for (size_t i = 0; i < part; ++i) mine[i] = Vector{i, i};
    for (int pass = 0; pass < passes; ++pass) {
      arrived[thread] = Clock::now();
      barrier.wait(2 * pass + 1);
      const Vector result = sum(mine, part);
      // Shared, or the compiler could drop the reads.
      total += result[0] + result[1];
      finished[thread] = Clock::now();
      barrier.wait(2 * pass + 2);
      if (thread > 0) continue;
      // From the last arrival: a thread that the system runs late would measure less.
      const auto start = *std::max_element(arrived.begin(), arrived.end());
      const auto end = *std::max_element(finished.begin(), finished.end());
      fastest = std::max(fastest, static_cast<double>(size) / std::chrono::duration<double>(end - start).count());
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  return fastest;
}
