// The product of `multiply.h` for weights of 8 bits: C[rows][32] = A[rows][inner] * B[inner][32], A in 16 bits.
//
// A row of A is a fixed-point number per element, q = 256 * high + low with both bytes unsigned and 32768 added, so
// that the instructions that multiply bytes do all the work and weights stay the bytes that they are in memory. Sums
// are integers and exact: every instruction set gives the same ones. The offset is taken away by the columns' sums.
//
// A panel is [inner / 4][32][4] bytes. Knows layouts; nothing of scales.
#pragma once

#include "multiply.h"

namespace fermata {

constexpr int kQuad = 4;  // elements that a lane multiplies at a time
constexpr int kOffset = 32768;
constexpr float kLargest = 32512.0f;  // 127 * 256: what the largest element of a row becomes

constexpr int kFewRows = 4;                                     // their sums stay in registers
constexpr long kAheadOfBytes = 4096, kAheadOfByteTiles = 7168;  // as `kAhead`

// Rows in two planes of unsigned bytes.
struct Planes {
  const uint8_t* high;
  const uint8_t* low;
};

template <int Rows>
inline void add_bytes(int inner, Planes a, int a_stride, const int8_t* b, bool streamed, Integers (&high)[Rows][2],
                      Integers (&low)[Rows][2]) {
  for (int k = 0; k < inner; k += kQuad) {
    const int8_t* line = b + static_cast<long>(k) * kPanel;
    if (streamed) prefetch(line, kAheadOfBytes, kQuad * kPanel);
    Integers weights[2];
    std::memcpy(weights, line, sizeof weights);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      int32_t high_bytes, low_bytes;
      std::memcpy(&high_bytes, a.high + static_cast<long>(row) * a_stride + k, sizeof high_bytes);
      std::memcpy(&low_bytes, a.low + static_cast<long>(row) * a_stride + k, sizeof low_bytes);
      for (int half = 0; half < 2; ++half) {
#if defined(__AVX512VNNI__)
        const auto columns = bits_of<__m512i>(weights[half]);
        high[row][half] = bits_of<Integers>(
            _mm512_dpbusd_epi32(bits_of<__m512i>(high[row][half]), _mm512_set1_epi32(high_bytes), columns));
        low[row][half] = bits_of<Integers>(
            _mm512_dpbusd_epi32(bits_of<__m512i>(low[row][half]), _mm512_set1_epi32(low_bytes), columns));
#else
        for (int shift = 0; shift < 32; shift += 8) {
          const Integers column = (weights[half] << (24 - shift)) >> 24;
          high[row][half] += column * ((high_bytes >> shift) & 0xff);
          low[row][half] += column * ((low_bytes >> shift) & 0xff);
        }
#endif
      }
    }
  }
}

// Joins the sums of both planes to C, without the offset.
inline void store_joined(float* c, Integers high, Integers low, Integers column_sums) {
  const Integers centred = high - column_sums * (kOffset / 256);
  store(c, __builtin_convertvector(centred, Floats) * 256.0f + __builtin_convertvector(low, Floats));
}

template <int Rows>
inline void multiply_bytes_at_most(int rows, int inner, Planes a, int a_stride, const int8_t* b,
                                   const int32_t* column_sums, float* c, bool streamed) {
  for (; rows >= Rows; rows -= Rows) {
    Integers high[Rows][2] = {}, low[Rows][2] = {}, sums[2];
    add_bytes<Rows>(inner, a, a_stride, b, streamed, high, low);
    streamed = false;
    std::memcpy(sums, column_sums, sizeof sums);
    for (int row = 0; row < Rows; ++row)
      for (int half = 0; half < 2; ++half)
        store_joined(c + row * kPanel + half * kLanes, high[row][half], low[row][half], sums[half]);
    a.high += static_cast<long>(Rows) * a_stride;
    a.low += static_cast<long>(Rows) * a_stride;
    c += static_cast<long>(Rows) * kPanel;
  }
  if constexpr (Rows > 1) {
    if (rows > 0) multiply_bytes_at_most<Rows / 2>(rows, inner, a, a_stride, b, column_sums, c, streamed);
  }
}

#if defined(FERMATA_AMX)
// Tiles 0 and 1: high sums, left and right columns; 2 and 3: low sums; 4 and 5: high and low bytes of the same rows;
// 6 and 7: columns of B.
inline void multiply_bytes_amx(int rows, int inner, Planes a, int a_stride, const int8_t* b, const int32_t* column_sums,
                               float* c, bool streamed) {
  constexpr int kTile = 16, kDepth = 64;
  alignas(64) int32_t high[kTile][kPanel], low[kTile][kPanel];
  Integers sums[2];
  std::memcpy(sums, column_sums, sizeof sums);
  for (int first = 0; first < rows; first += kTile) {
    const int count = rows - first < kTile ? rows - first : kTile;
    TileShape::set(count);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < inner; k += kDepth) {
      const int8_t* lines = b + static_cast<long>(k) * kPanel;
      _tile_loadd(6, lines, kQuad * kPanel);
      _tile_loadd(7, lines + kQuad * kLanes, kQuad * kPanel);
      if (streamed && first == 0) prefetch(lines, kAheadOfByteTiles, 32L * kDepth);
      _tile_loadd(4, a.high + static_cast<long>(first) * a_stride + k, a_stride);
      _tile_loadd(5, a.low + static_cast<long>(first) * a_stride + k, a_stride);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, high[0], sizeof high[0]);
    _tile_stored(1, high[0] + kLanes, sizeof high[0]);
    _tile_stored(2, low[0], sizeof low[0]);
    _tile_stored(3, low[0] + kLanes, sizeof low[0]);
    for (int row = 0; row < count; ++row)
      for (int half = 0; half < 2; ++half) {
        Integers upper, lower;
        std::memcpy(&upper, high[row] + half * kLanes, sizeof upper);
        std::memcpy(&lower, low[row] + half * kLanes, sizeof lower);
        store_joined(c + static_cast<long>(first + row) * kPanel + half * kLanes, upper, lower, sums[half]);
      }
  }
}
#endif

// C[rows][32] = A * B with A in two planes and B a panel of bytes whose columns sum up to `column_sums`; for `streamed`
// see `multiply`. Few rows leave tiles empty: vectors, which ask for memory line by line, are faster then, and the
// sums, being exact, are the same.
inline void multiply_bytes(int rows, int inner, Planes a, int a_stride, const int8_t* b, const int32_t* column_sums,
                           float* c, bool streamed) {
#if defined(FERMATA_AMX)
  if (rows > kFewRows) return multiply_bytes_amx(rows, inner, a, a_stride, b, column_sums, c, streamed);
#endif
  multiply_bytes_at_most<kFewRows>(rows, inner, a, a_stride, b, column_sums, c, streamed);
}

}  // namespace fermata
