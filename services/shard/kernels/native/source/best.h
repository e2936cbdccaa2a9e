// The largest logit of each row, found while the logits pass by; of equal ones the lowest id.
#pragma once

#include <vector>

#include "operand.h"

namespace fermata {

// What one thread has seen: lane by lane the best, because a comparison of whole vectors costs next to nothing.
class Best {
 public:
  static constexpr int kNone = -1;

  void reserve(int rows) {
    values_.reserve(static_cast<size_t>(rows) * kLanes);
    columns_.reserve(static_cast<size_t>(rows) * kLanes);
    wrong_.reserve(static_cast<size_t>(rows) * kLanes);
  }

  // Forgets what was seen in another step.
  void begin(long step, int rows) {
    if (step == step_) return;
    step_ = step;
    const size_t count = static_cast<size_t>(rows) * kLanes;
    std::fill(values_.data(), values_.data() + count, -std::numeric_limits<float>::infinity());
    std::fill(columns_.data(), columns_.data() + count, std::numeric_limits<int32_t>::max());
    std::fill(wrong_.data(), wrong_.data() + count, 0.0f);
  }

  // The logits of ids column .. column + 15; those from `vocabulary` on are padding. A thread may take panels in any
  // order.
  void see(int row, int column, Floats logits, int vocabulary) {
    if (column >= vocabulary) return;
    for (int lane = vocabulary - column; lane < kLanes; ++lane) logits[lane] = logits[0];  // never better than lane 0
    const size_t place = static_cast<size_t>(row) * kLanes;
    const Floats value = load(values_.data() + place);
    Integers id;
    std::memcpy(&id, columns_.data() + place, sizeof id);
    const Integers better = (logits > value) | ((logits == value) & (column < id));
    store(values_.data() + place, select(better, logits, value));
    id = (better & column) | (~better & id);
    std::memcpy(columns_.data() + place, &id, sizeof id);
    store(wrong_.data() + place, load(wrong_.data() + place) + (logits - logits));
  }

  // The id that is best for a row after all threads that took part; `kNone` where a logit is not finite.
  static int32_t of(const std::vector<Best>& threads, long step, int row) {
    float most = -std::numeric_limits<float>::infinity();
    int32_t id = std::numeric_limits<int32_t>::max();
    for (const Best& best : threads) {
      if (best.step_ != step) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        const size_t place = static_cast<size_t>(row) * kLanes + lane;
        if (best.wrong_[place] != 0.0f) return kNone;
        if (best.columns_[place] == std::numeric_limits<int32_t>::max()) continue;
        const float value = best.values_[place];
        const int32_t here = best.columns_[place] + lane;
        if (value > most || (value == most && here < id)) most = value, id = here;
      }
    }
    return id;
  }

 private:
  long step_ = -1;
  Buffer<float> values_, wrong_;
  Buffer<int32_t> columns_;
};

}  // namespace fermata
