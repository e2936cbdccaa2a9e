// The one product that everything is made of: C[rows][32] = A[rows][inner] * B[inner][32].
//
// B is a *panel*: 32 columns, stored so that a lane finds the `kPair` elements that it multiplies at a time side by
// side. A weight is a row of panels; so are a page of keys and a page of values. A panel is read once for all rows.
//
// Every (row, column) is added up over `inner` in one order, which depends on the instruction set and on nothing else:
// not on the number of rows, nor on where a row lies (R23). Each instruction set has its own function, chosen when this
// is compiled; Python decides which ones the machine has (`compiler.py`).
//
// Knows layouts; nothing of what is multiplied.
#pragma once

#include "vectors.h"

#if defined(FERMATA_AMX)
#include "multiply_amx.h"
#endif

namespace fermata {

constexpr int kPanel = 32;      // columns of a panel: two vectors
constexpr int kInnerStep = 64;  // `inner` is a multiple of this, filled up with zeros
constexpr int kSlice = 256;     // float32 sums of so many products are added up apart: a long sum loses fewer bits

// Rows that share one pass over a panel: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kMostRows = 12;
#else
constexpr int kMostRows = 2;
#endif

// Bytes between what is read of a stream from memory and what is asked for. The processor asks for a little by itself,
// and begins anew at each page of 4 KiB; without this a fifth less comes per second (26 instead of 33 GB/s by two
// threads), and a seventh less with 16 to 64 KiB.
constexpr long kAhead = 2048;

// Adds the products of `inner` elements to the sums of `Rows` rows.
template <int Rows>
inline void add_products(int inner, const float* a, int a_stride, const float* b, int b_stride, bool streamed,
                         Floats (&sums)[Rows][2]) {
#pragma GCC unroll 4  // the addresses of so many rows do not fit into registers: they are fetched once for four lines
  for (int k = 0; k < inner; ++k) {
    const float* line = b + static_cast<long>(k) * b_stride;
    if (streamed) prefetch(line, kAhead, sizeof(float) * kPanel);
    const Floats left = load(line), right = load(line + kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Floats factor = all(a[static_cast<long>(row) * a_stride + k]);
      sums[row][0] += factor * left;
      sums[row][1] += factor * right;
    }
  }
}

template <int Rows>
inline void add_products(int inner, const BFloat16* a, int a_stride, const BFloat16* b, int b_stride, bool streamed,
                         Floats (&sums)[Rows][2]) {
  for (int k = 0; k < inner; k += 2) {
    const BFloat16* line = b + static_cast<long>(k / 2) * b_stride;
    if (streamed) prefetch(line, kAhead, 2 * sizeof(BFloat16) * kPanel);
    Words left, right;
    std::memcpy(&left, line, sizeof left);
    std::memcpy(&right, line + 2 * kLanes, sizeof right);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      uint32_t pair;
      std::memcpy(&pair, a + static_cast<long>(row) * a_stride + k, sizeof pair);
#if defined(__AVX512BF16__)
      const auto factor = bits_of<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
      sums[row][0] = bits_of<Floats>(_mm512_dpbf16_ps(bits_of<__m512>(sums[row][0]), factor, bits_of<__m512bh>(left)));
      sums[row][1] = bits_of<Floats>(_mm512_dpbf16_ps(bits_of<__m512>(sums[row][1]), factor, bits_of<__m512bh>(right)));
#else
      const Floats even = all(bits_of<float>(pair << 16)), odd = all(bits_of<float>(pair & 0xffff0000u));
      sums[row][0] += even * bits_of<Floats>(left << 16);
      sums[row][1] += even * bits_of<Floats>(right << 16);
      sums[row][0] += odd * bits_of<Floats>(left & 0xffff0000u);
      sums[row][1] += odd * bits_of<Floats>(right & 0xffff0000u);
#endif
    }
  }
}

template <int Rows, class Element>
inline void multiply_rows(int inner, const Element* a, int a_stride, const Element* b, int b_stride, float* c,
                          int c_stride, bool accumulate, bool streamed) {
  const int slice = sizeof(Element) == 4 ? kSlice : inner;
  for (int first = 0; first < inner; first += slice) {
    Floats sums[Rows][2] = {};
    const int size = first + slice < inner ? slice : inner - first;
    add_products<Rows>(size, a + first, a_stride, b + static_cast<long>(first / kPair<Element>) * b_stride, b_stride,
                       streamed, sums);
    for (int row = 0; row < Rows; ++row)
      for (int half = 0; half < 2; ++half) {
        float* const target = c + static_cast<long>(row) * c_stride + half * kLanes;
        store(target, accumulate ? load(target) + sums[row][half] : sums[row][half]);
      }
    accumulate = true;
  }
}

// Takes `Rows` rows at a time as long as there are so many, then fewer.
template <int Rows, class Element>
inline void multiply_at_most(int rows, int inner, const Element* a, int a_stride, const Element* b, int b_stride,
                             float* c, int c_stride, bool accumulate, bool streamed) {
  for (; rows >= Rows; rows -= Rows) {
    multiply_rows<Rows>(inner, a, a_stride, b, b_stride, c, c_stride, accumulate, streamed);
    streamed = false;
    a += static_cast<long>(Rows) * a_stride;
    c += static_cast<long>(Rows) * c_stride;
  }
  if constexpr (Rows > 1) {
    if (rows > 0)
      multiply_at_most<(Rows > 8 ? 8 : Rows / 2)>(rows, inner, a, a_stride, b, b_stride, c, c_stride, accumulate,
                                                  streamed);
  }
}

// C[rows][32] = A * B, where B is `segment_count` panels of `inner` lines each, one continuing the other. Strides are
// in elements; that of B is from one group of `kPair` lines to the next. `streamed`: B comes from memory, and what lies
// behind it will be read next.
template <class Element>
inline void multiply(int rows, int inner, const Element* a, int a_stride, const Element* const* segments,
                     int segment_count, int b_stride, float* c, int c_stride, bool streamed) {
#if defined(FERMATA_AMX)
  if constexpr (sizeof(Element) == 2) {
    multiply_amx(rows, inner, a, a_stride, segments, segment_count, b_stride, c, c_stride, streamed);
    return;
  }
#endif
  for (int segment = 0; segment < segment_count; ++segment)
    multiply_at_most<kMostRows>(rows, inner, a + segment * inner, a_stride, segments[segment], b_stride, c, c_stride,
                                segment > 0, streamed);
}

}  // namespace fermata
