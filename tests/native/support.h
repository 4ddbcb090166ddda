// What random problems are made of: memory with a forbidden page behind it, threads that run tasks.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "share.h"

namespace support {

// Memory whose last byte is the last of a page, with a forbidden page behind it.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page;
    whole_ = (pages + 1) * page;
    base_ = static_cast<char*>(mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    if (mprotect(base_ + pages * page, page, PROT_NONE)) std::abort();
    data_ = base_ + pages * page - bytes;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, whole_); }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data_); }

 private:
  size_t bytes_, whole_;
  char *base_, *data_;
};

class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; i++) threads_.emplace_back([this] { serve(); });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
  }
  void schedule(std::function<void()> work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(work));
    }
    wake_.notify_one();
  }

 private:
  void serve() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      work();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

inline void run(void* context, int64_t workers, int64_t count, void (*task)(void*, int64_t, int64_t), void* argument) {
  auto* threads = static_cast<Threads*>(context);
  qjax::share([threads](auto work) { threads->schedule(work); }, workers, count, task, argument);
}

// A digest of results that are the same on every processor, NaN counting as one number. Not for several callers at once.
struct Digest {
  bool wanted = false;
  uint64_t value = 14695981039346656037u;
  void add(const std::vector<float>& numbers) {
    for (const float number : numbers) {
      uint32_t word = 0x7fc00000;
      if (number == number) std::memcpy(&word, &number, 4);
      if (wanted) value = (value ^ word) * 1099511628211u;
    }
  }
};
inline Digest digest;

struct Aligned {
  explicit Aligned(int64_t bytes) : data(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {}
  ~Aligned() { std::free(data); }
  char* data;
};

}  // namespace support
