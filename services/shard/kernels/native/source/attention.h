// Causal grouped-query attention of one tile of queries over the pages of its sequence, for one key-value head.
//
// Keys are taken in *splits* of 256 positions, counted from position 0 whatever the window or the chunk. In a split all
// scores are computed, then their maximum, weights and weighted sum; splits are merged in order (Milakov and
// Gimelshein 2018). Keys that a query does not see weigh exactly zero, and a split of which it sees nothing is skipped:
// so a row has the same bits in a decoding step, in a chunk of any size, and whichever pages its neighbours need (R23).
//
// Knows one tile; nothing of layers and of who computes the others.
#pragma once

#include "operand.h"

namespace fermata {

constexpr int kSplit = 256;

// Scratch memory of one thread.
template <class Element>
struct AttentionScratch {
  Buffer<float> scores;                   // [rows, 256]
  Buffer<Element> weights;                // [rows, 256]
  Buffer<float> part;                     // [rows, head]
  Buffer<float> total;                    // [rows, head]
  Buffer<float> peaks;                    // [rows], largest score so far
  Buffer<float> masses;                   // [rows], sum of the weights so far
  Buffer<float> part_peaks, part_masses;  // the same of one split

  void reserve(int rows, int head) {
    scores.reserve(static_cast<size_t>(rows) * kSplit);
    weights.reserve(static_cast<size_t>(rows) * kSplit);
    part.reserve(static_cast<size_t>(rows) * head);
    total.reserve(static_cast<size_t>(rows) * head);
    peaks.reserve(rows);
    masses.reserve(rows);
    part_peaks.reserve(rows);
    part_masses.reserve(rows);
  }
};

// The pages of one head: group by group of kPair elements, see `model.h`.
template <class Element>
struct Pages {
  const Element* keys;
  const Element* values;
  size_t page_stride;    // elements from one block of the pool to the next
  const int32_t* table;  // blocks of the sequence
  int page;              // positions
  int head;              // padded width
};

struct Window {
  int size;  // 0 is all

  int first_seen(int position) const { return size > 0 && position >= size ? position - size + 1 : 0; }
};

// Softmax weights of one row over columns [begin, end) of a split, of which it sees [first, last]; the others weigh
// zero. Returns the largest score (-inf if nothing is seen) and the sum of the weights.
template <class Element>
inline float weigh(float* scores, Element* weights, int begin, int end, int first, int last, float softcap,
                   float& mass) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  first = std::max(first, begin);
  last = std::min(last, end - 1);
  mass = 0.0f;
  if (last < first) {
    std::fill(weights + begin, weights + end, Element{});
    return kNothing;
  }
  const int from = first / kLanes * kLanes, to = round_up(last + 1, kLanes);
  if (softcap > 0.0f)
    for (int base = from; base < to; base += kLanes)
      store(scores + base, softcap * hyperbolic_tangent(load(scores + base) / softcap));
  std::fill(scores + from, scores + first, kNothing);
  std::fill(scores + last + 1, scores + to, kNothing);
  Floats peaks = load(scores + from);
  for (int base = from + kLanes; base < to; base += kLanes) peaks = maximum(peaks, load(scores + base));
  const float peak = largest(peaks);
  std::fill(weights + begin, weights + from, Element{});
  Floats sums{};
  for (int base = from; base < to; base += kLanes) {
    const Floats weight = exponential(load(scores + base) - peak);  // zero where nothing is seen
    sums += weight;
    store(weights + base, weight);
  }
  std::fill(weights + to, weights + end, Element{});
  mass = sum(sums);
  return peak;
}

// Adds a split to what was attended before. Where a row saw nothing of it, nothing changes.
template <class Element>
inline void merge(AttentionScratch<Element>& scratch, int rows, int head) {
  for (int row = 0; row < rows; ++row) {
    const float before = scratch.peaks[row], peak = scratch.part_peaks[row];
    if (scratch.part_masses[row] == 0.0f) continue;
    const float most = before > peak ? before : peak;
    const float keep = exponential(all(before - most))[0], add = exponential(all(peak - most))[0];
    scratch.peaks[row] = most;
    scratch.masses[row] = scratch.masses[row] * keep + scratch.part_masses[row] * add;
    float* const total = &scratch.total[static_cast<size_t>(row) * head];
    const float* const part = &scratch.part[static_cast<size_t>(row) * head];
    for (int column = 0; column < head; column += kLanes)
      store(total + column, load(total + column) * keep + load(part + column) * add);
  }
}

// Attends the `rows` queries (positions[row / group]) at `queries` [rows, head], scaled; the result is in
// `scratch.total`.
template <class Element>
void attend(const Pages<Element>& pages, const Element* queries, int rows, int group, const int32_t* positions,
            Window window, float softcap, AttentionScratch<Element>& scratch) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const int head = pages.head, page = pages.page;
  const int lowest = window.first_seen(positions[0]), highest = positions[(rows - 1) / group];
  std::fill(scratch.peaks.data(), scratch.peaks.data() + rows, kNothing);
  std::fill(scratch.masses.data(), scratch.masses.data() + rows, 0.0f);
  std::fill(scratch.total.data(), scratch.total.data() + static_cast<size_t>(rows) * head, 0.0f);

  for (int base = lowest / kSplit * kSplit; base <= highest; base += kSplit) {
    const int begin = lowest > base ? (lowest - base) / page * page : 0;
    const int end = std::min(kSplit, round_up(highest + 1 - base, page));
    for (int column = begin; column < end; column += page) {
      const int32_t* const block = pages.table + (base + column) / page;
      const Element* keys = pages.keys + pages.page_stride * block[0];
      const long bytes = static_cast<long>(page) * head * sizeof(Element);
      prefetch(pages.values + pages.page_stride * block[0], 0, bytes);
      if (column + page < end) prefetch(pages.keys + pages.page_stride * block[1], 0, bytes);
      for (int panel = 0; panel < page; panel += kPanel, keys += kPanel * kPair<Element>)
        multiply(rows, head, queries, head, &keys, 1, page * kPair<Element>, scratch.scores.data() + column + panel,
                 kSplit, false);
    }
    for (int row = 0; row < rows; ++row) {
      const int position = positions[row / group];
      const size_t place = static_cast<size_t>(row) * kSplit;
      scratch.part_peaks[row] =
          weigh(&scratch.scores[place], &scratch.weights[place], begin, end, window.first_seen(position) - base,
                position - base, softcap, scratch.part_masses[row]);
    }
    const Element* values[kSplit / kPanel];
    int count = 0;
    for (int column = begin; column < end; column += page)
      values[count++] = pages.values + pages.page_stride * pages.table[(base + column) / page];
    for (int panel = 0; panel < head; panel += kPanel) {
      multiply(rows, page, scratch.weights.data() + begin, kSplit, values, count, head * kPair<Element>,
               scratch.part.data() + panel, head, false);
      for (int segment = 0; segment < count; ++segment) values[segment] += kPanel * kPair<Element>;
    }
    merge(scratch, rows, head);
  }
}

}  // namespace fermata
