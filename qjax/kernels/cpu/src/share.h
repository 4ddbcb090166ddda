// Sharing tasks among threads that may all be busy.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace qjax {

// Runs tasks 0 to count - 1, by the caller and up to workers - 1 others, and returns when all are done.
//
// Tasks are taken from a counter by whoever is free, the caller among them: if every other thread is busy, the caller
// does all, so that it never waits for what has not begun. A thread that comes late finds none left, and looks at nothing
// but the counter, which it shares in owning: what `argument` points to may be gone by then.
//
// `schedule` takes a function of no arguments, and has some thread run it sooner or later.
template <class Schedule>
void share(const Schedule& schedule, int64_t workers, int64_t count, void (*task)(void*, int64_t, int64_t),
           void* argument) {
  if (workers <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; i++) task(argument, i, 0);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, count, task, argument](int64_t worker) {
    for (int64_t i; (i = state->next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      task(argument, i, worker);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t w = 1; w < workers; w++) schedule([work, w] { work(w); });
  work(0);
  for (int64_t spins = 0; state->done.load(std::memory_order_acquire) < count; spins++) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace qjax
