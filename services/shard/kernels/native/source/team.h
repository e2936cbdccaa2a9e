// The compute threads of a process, and how they share a step.
//
// A step is a program of phases that every thread runs through. The items of a phase are dealt out as one contiguous
// range per thread, because a range of weights is read as one stream; whoever is done takes items from the others'
// ranges. A phase is over when its items are done, not when all threads have come: a thread that has lost its core to
// another process is waited for only if it holds an item. It may come to a phase, or to the whole step, when all is
// done: it then finds nothing to do, runs through the rest of the program and waits for the next step.
// A thread that lost its core within an item is what costs most, as the others then wait for all the time that it is
// away. So threads give way by themselves every few items, when they hold none, to whoever waits for their core: the
// services beside, whose bursts of a millisecond per step would otherwise fall into items. They give at most a part of
// their time (`Turn`), because a neighbour that computes all the time takes whatever it is given.
// Who computes an item changes no bit of it. Waiting threads spin for a moment, then yield; between steps they sleep.
//
// Knows numbers of items; nothing of what they are.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace fermata {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Time that passes: half to a third of a nanosecond where the processor counts, which takes a sixth of asking a clock.
inline int64_t ticks() {
#if defined(__x86_64__)
  return static_cast<int64_t>(__builtin_ia32_rdtsc());
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// What a thread does again and again while it waits.
struct Pause {
  void operator()() const { pause_briefly(); }
};

// When a thread gives way next. What others may take in its turns is paid from an allowance that grows with time.
class alignas(64) Turn {
 public:
  bool is_over() const { return ticks() - began_ > kLength; }

  void give_way() {
    const int64_t now = ticks();
    allowance_ = std::min(kMost, allowance_ + (now - began_) / kShare);
    began_ = now;
    if (allowance_ < 0) return;
    sched_yield();
    began_ = ticks();
    allowance_ -= began_ - now;
  }

 private:
  static constexpr int64_t kLength = 200'000;  // a few items
  static constexpr int64_t kMost = 20'000'000;
  static constexpr int64_t kShare = 8;  // one part in eight: about what the services beside need
  int64_t began_ = 0, allowance_ = 0;
};

// A thread on its way through the phases of a step.
struct Worker {
  int thread;
  uint32_t step;
  int phase;
};

class Team {
 public:
  // `program` is run by all threads in each step, with at most `phases` phases. The thread that runs it may be late,
  // the step over and the next one under way: outside of items it may only use what `enter(thread)` has copied for it.
  Team(int size, int phases, std::function<void(int)> enter, std::function<void(Worker&)> program)
      : size_(size),
        enter_(std::move(enter)),
        program_(std::move(program)),
        next_(new Counter[static_cast<size_t>(size) * phases]),
        done_(new Counter[phases]),
        turns_(new Turn[size]) {
    for (int thread = 1; thread < size; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      step_.fetch_add(2, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  // Where the range of items of a thread begins; it ends where the next one's begins.
  int begin_of(int thread, int count) const { return static_cast<int>(static_cast<long>(count) * thread / size_); }

  // Runs a step; the caller is the first of the threads. `prepare` sets up what `enter` copies.
  template <class Prepare>
  void run(const Prepare& prepare) {
    // Odd while the step is being prepared: whoever copies meanwhile notices it, and copies again (a sequence lock).
    step_.fetch_add(1, std::memory_order_acq_rel);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    prepare();
    bool sleepers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      step_.fetch_add(1, std::memory_order_release);
      sleepers = sleepers_ > 0;
    }
    if (sleepers) wake_.notify_all();
    Worker first{0, step_.load(std::memory_order_relaxed), 0};
    enter_(0);
    program_(first);
  }

  // Calls `item(index)` for 0 <= index < count, shared among the threads; all of them call this with the same count.
  // Returns when all items are done. For the first moment of waiting it calls `wait()`, which must be short.
  template <class Item, class Wait = Pause>
  void phase(Worker& worker, int count, const Item& item, Wait wait = {}) {
    const int number = worker.phase++;
    uint32_t finished = 0;
    for (int turn = 0; turn < size_; ++turn) {
      const int owner = (worker.thread + turn) % size_;
      const int first = begin_of(owner, count), size = begin_of(owner + 1, count) - first;
      Counter& next = next_[static_cast<size_t>(number) * size_ + owner];
      for (int index; (index = take(next, worker.step, size)) >= 0;) {
        item(first + index);
        ++finished;
        if (size_ == 1 || !turns_[worker.thread].is_over()) continue;
        add(done_[number], worker.step, std::exchange(finished, 0));
        turns_[worker.thread].give_way();
      }
    }
    if (finished > 0) add(done_[number], worker.step, finished);
    for (int spins = 0; !is_done(done_[number], worker.step, count); ++spins)
      spins < kSpins ? wait() : static_cast<void>(sched_yield());
  }

 private:
  static constexpr int kSpins = 1000;
  static constexpr int kIdleYields = 200;  // before a thread sleeps between steps

  // The step that a count belongs to in the upper half, the count in the lower one: nothing needs to be cleared, and a
  // late thread cannot take what belongs to a later step.
  struct alignas(64) Counter {
    std::atomic<uint64_t> value{0};
  };

  static bool is_later(uint64_t value, uint32_t step) { return static_cast<int32_t>((value >> 32) - step) > 0; }
  static uint32_t count_of(uint64_t value, uint32_t step) {
    return static_cast<uint32_t>(value >> 32) == step ? static_cast<uint32_t>(value) : 0;
  }
  static uint64_t counted(uint32_t step, uint32_t count) { return static_cast<uint64_t>(step) << 32 | count; }

  // The next item of a range, or -1.
  static int take(Counter& next, uint32_t step, int size) {
    uint64_t value = next.value.load(std::memory_order_relaxed);
    while (true) {
      const uint32_t index = count_of(value, step);
      if (is_later(value, step) || static_cast<int>(index) >= size) return -1;
      if (next.value.compare_exchange_weak(value, counted(step, index + 1), std::memory_order_relaxed))
        return static_cast<int>(index);
    }
  }

  // Only those who hold items of a step call this, so no later one can have begun.
  static void add(Counter& done, uint32_t step, uint32_t finished) {
    uint64_t value = done.value.load(std::memory_order_relaxed);
    while (!done.value.compare_exchange_weak(value, counted(step, count_of(value, step) + finished),
                                             std::memory_order_acq_rel, std::memory_order_relaxed)) {
    }
  }

  static bool is_done(const Counter& done, uint32_t step, int count) {
    const uint64_t value = done.value.load(std::memory_order_acquire);
    return is_later(value, step) || static_cast<int>(count_of(value, step)) >= count;
  }

  void work(int thread) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "compute");  // `top -H` and benchmarks tell them apart
#endif
    for (uint32_t seen = 0;;) {
      for (int yields = 0; yields < kIdleYields && !is_open(seen); ++yields) sched_yield();
      if (!is_open(seen)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [&] { return is_open(seen); });
        --sleepers_;
      }
      if (stopping_) return;
      const uint32_t step = step_.load(std::memory_order_acquire);
      enter_(thread);
      std::atomic_thread_fence(std::memory_order_acquire);
      if (step % 2 != 0 || step_.load(std::memory_order_relaxed) != step) continue;
      seen = step;
      Worker worker{thread, step, 0};
      program_(worker);
    }
  }

  // Whether there is a step behind the one that was seen last.
  bool is_open(uint32_t seen) const {
    const uint32_t step = step_.load(std::memory_order_acquire);
    return step != seen && step % 2 == 0;
  }

  const int size_;
  const std::function<void(int)> enter_;
  const std::function<void(Worker&)> program_;
  const std::unique_ptr<Counter[]> next_, done_;
  const std::unique_ptr<Turn[]> turns_;
  alignas(64) std::atomic<uint32_t> step_{0};
  std::atomic<bool> stopping_{false};
  int sleepers_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace fermata
