// The rows that a matrix product takes, in the form that its weights want: float32, bfloat16, or two planes of bytes.
//
// Knows one row at a time; nothing of where it comes from.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "model.h"
#include "multiply_int8.h"

namespace fermata {

// Memory that grows and is never given back; lines of a cache each, zeros at first.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // What was in it is lost when it grows.
  void reserve(size_t count) {
    if (count <= count_) return;
    std::free(data_);
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
    count_ = count;
  }
  T* data() const { return data_; }
  T& operator[](size_t index) const { return data_[index]; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

template <class Weight>
inline const void* panel_of(const Linear& linear, int panel) {
  return static_cast<const Weight*>(linear.panels) + static_cast<size_t>(panel) * linear.inner * kPanel;
}

// Rows of float32 or bfloat16.
template <class Weight>
class Operand {
 public:
  void reserve(int rows, int inner) {
    stride_ = round_up(inner, kInnerStep);
    rows_.reserve(static_cast<size_t>(rows) * stride_);
    // Columns behind `inner` meet weights that are zero, but must be numbers.
    for (int row = 0; row < rows; ++row)
      std::fill(rows_.data() + static_cast<size_t>(row) * stride_ + inner,
                rows_.data() + static_cast<size_t>(row + 1) * stride_, Weight{});
  }

  void put(int row, int column, Floats values) { store(at(row) + column, values); }
  void put_one(int row, int column, float value) { at(row)[column] = round_to<Weight>(value); }
  void put_row(int row, const float* values, int count) {
    for (int column = 0; column < count; column += kLanes) put(row, column, load(values + column));
  }

  void multiply_panel(const Linear& linear, int panel, int first, int rows, float* sums, bool streamed) const {
    const Weight* const lines = static_cast<const Weight*>(panel_of<Weight>(linear, panel));
    multiply(rows, linear.inner, at(first), stride_, &lines, 1, kPanel * kPair<Weight>, sums, kPanel, streamed);
  }

 private:
  Weight* at(int row) const { return rows_.data() + static_cast<size_t>(row) * stride_; }

  Buffer<Weight> rows_;
  int stride_ = 0;
};

// Rows in 16 bits of fixed point, each with a scale of its own.
template <>
class Operand<int8_t> {
 public:
  void reserve(int rows, int inner) {
    stride_ = round_up(inner, kInnerStep);
    high_.reserve(static_cast<size_t>(rows) * stride_);
    low_.reserve(static_cast<size_t>(rows) * stride_);
    scales_.reserve(rows);
    for (int row = 0; row < rows; ++row) {
      const size_t begin = static_cast<size_t>(row) * stride_;
      std::fill(high_.data() + begin + inner, high_.data() + begin + stride_, static_cast<uint8_t>(0));
      std::fill(low_.data() + begin + inner, low_.data() + begin + stride_, static_cast<uint8_t>(0));
    }
  }

  void put_row(int row, const float* values, int count) {
    Floats peak{}, wrong{};
    for (int column = 0; column < count; column += kLanes) {
      const Floats value = load(values + column);
      peak = maximum(peak, maximum(value, -value));
      wrong += value - value;  // not zero where it is not finite: the whole row is wrong then
    }
    const float most = largest(peak);
    const float scale = (most > 0.0f ? most / kLargest : 1.0f) + sum(wrong);
    const Floats factor = all(1.0f / scale);
    scales_[row] = scale;
    const size_t begin = static_cast<size_t>(row) * stride_;
    for (int column = 0; column < count; column += kLanes) {
      constexpr float kMagic = 12582912.0f;  // see `exponential`
      const Floats rounded = load(values + column) * factor + kMagic;
      const Integers fixed = bits_of<Integers>(rounded) - bits_of<int32_t>(kMagic) + kOffset;
      put_bytes(high_.data() + begin + column, fixed >> 8);
      put_bytes(low_.data() + begin + column, fixed & 0xff);
    }
  }

  void multiply_panel(const Linear& linear, int panel, int first, int rows, float* sums, bool streamed) const {
    const int8_t* const lines = static_cast<const int8_t*>(panel_of<int8_t>(linear, panel));
    const size_t begin = static_cast<size_t>(first) * stride_;
    multiply_bytes(rows, linear.inner, {high_.data() + begin, low_.data() + begin}, stride_, lines,
                   linear.column_sums + panel * kPanel, sums, streamed);
    const Floats left = load(linear.scales + panel * kPanel), right = load(linear.scales + panel * kPanel + kLanes);
    for (int row = 0; row < rows; ++row) {
      float* const target = sums + row * kPanel;
      const Floats scale = all(scales_[first + row]);
      store(target, load(target) * (scale * left));
      store(target + kLanes, load(target + kLanes) * (scale * right));
    }
  }

 private:
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  static void put_bytes(uint8_t* target, Integers values) {
    const Bytes bytes = __builtin_convertvector(values, Bytes);
    std::memcpy(target, &bytes, sizeof bytes);
  }

  Buffer<uint8_t> high_, low_;
  Buffer<float> scales_;
  int stride_ = 0;
};

}  // namespace fermata
