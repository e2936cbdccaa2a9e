// The compute threads of a process, and how they share a step.
//
// A step is one parallel region: every thread runs the same code, phase after phase. The items of a phase are dealt out
// as one contiguous range per thread, because a range of weights is read as one stream; whoever is done takes items
// from the others' ranges, because a thread may have lost its core to another process. Who computes an item changes no
// bit of it. Waiting threads spin for a moment, then yield; between steps they sleep.
//
// Knows numbers of items; nothing of what they are.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fermata {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  explicit Team(int size) : size_(size), cursors_(2 * size) {
    for (int index = 1; index < size; ++index) workers_.emplace_back([this, index] { work(index); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      ++regions_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  // Where the range of items of a thread begins; it ends where the next one's begins.
  int begin_of(int thread, int count) const { return static_cast<int>(static_cast<long>(count) * thread / size_); }

  // Runs `region(thread index)` on all threads, the caller being the first, and returns when all are done.
  void run(const std::function<void(int)>& region) {
    region_ = &region;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      regions_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    region(0);
    barrier();
  }

  // Calls `item(index)` for 0 <= index < count, shared among the threads; all of them must call this with the same
  // count, and none goes on before all items are done.
  template <class Item>
  void phase(int thread, int count, const Item& item) {
    Cursor* const cursors = &cursors_[parity() * size_];
    for (int turn = 0; turn < size_; ++turn) {
      const int owner = (thread + turn) % size_;
      const int first = begin_of(owner, count), end = begin_of(owner + 1, count);
      while (true) {
        const int index = first + cursors[owner].next.fetch_add(1, std::memory_order_relaxed);
        if (index >= end) break;
        item(index);
      }
    }
    barrier();
  }

 private:
  static constexpr int kSpins = 2000;
  static constexpr int kIdleSpins = 200;  // yields before a thread sleeps between steps

  struct alignas(64) Cursor {
    std::atomic<int> next{0};
  };

  int parity() const { return phases_.load(std::memory_order_relaxed) & 1; }

  // The last one to arrive clears the cursors that all are done with, and lets all go on.
  void barrier() {
    const unsigned phase = phases_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      for (int owner = 0; owner < size_; ++owner)
        cursors_[(phase & 1) * size_ + owner].next.store(0, std::memory_order_relaxed);
      arrived_.store(0, std::memory_order_relaxed);
      phases_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phases_.load(std::memory_order_acquire) == phase; ++spins)
      spins < kSpins ? pause_briefly() : static_cast<void>(sched_yield());
  }

  void work(int index) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "compute");  // `top -H` and benchmarks tell them apart
#endif
    for (unsigned seen = 0;;) {
      for (int spins = 0; spins < kIdleSpins && regions_.load(std::memory_order_acquire) == seen; ++spins) sched_yield();
      if (regions_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return regions_.load(std::memory_order_acquire) != seen; });
      }
      ++seen;
      if (stopping_) return;
      (*region_)(index);
      barrier();
    }
  }

  const int size_;
  std::vector<Cursor> cursors_;
  std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phases_{0};
  alignas(64) std::atomic<unsigned> regions_{0};
  const std::function<void(int)>* region_ = nullptr;
  bool stopping_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace fermata
