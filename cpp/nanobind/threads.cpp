#include "threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace grinqh::python {
namespace {

std::atomic<int>& thread_count() {
  static std::atomic<int> count{static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};
  return count;
}

// Threads live for one call: starting them costs tens of microseconds, and none is left behind at a fork.
void run(std::int64_t count, std::int64_t grain, Executor::Body body, void* context) {
  const std::int64_t grains = (count + grain - 1) / grain;
  const std::int64_t pieces = std::min<std::int64_t>(num_threads(), grains);
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto run_piece = [&](std::int64_t piece) {
    try {
      body(piece * grains / pieces * grain, std::min(count, (piece + 1) * grains / pieces * grain), context);
    } catch (...) {
      const std::lock_guard lock(failure_mutex);
      failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    threads.reserve(static_cast<std::size_t>(pieces));
    for (std::int64_t piece = 1; piece < pieces; ++piece) threads.emplace_back(run_piece, piece);
    run_piece(0);
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

int num_threads() { return thread_count().load(std::memory_order_relaxed); }
void set_num_threads(int count) { thread_count().store(count, std::memory_order_relaxed); }
Executor thread_executor() { return {run}; }

}  // namespace grinqh::python
