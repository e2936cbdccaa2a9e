// The product of `multiply.h` in Intel's tile registers (AMX): 16 rows of 16 sums at a time, 32 products each per
// instruction. Two tiles of rows and two of columns share every load.
#pragma once

#include "vectors.h"

namespace fermata {

// Tells the registers how many rows their tiles have. A thread keeps what it was told last; telling costs as much as a
// few products.
class TileShape {
 public:
  // `rows` from 1 to 32, in tiles of 16.
  static void set(int rows) {
    if (rows == current()) return;
    current() = rows;
    alignas(64) Configuration configuration{};
    configuration.palette = 1;
    const int first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : first;
    for (int tile = 0; tile < 8; ++tile) {
      const bool upper = tile == 0 || tile == 1 || tile == 4, lower = tile == 2 || tile == 3 || tile == 5;
      configuration.rows[tile] = static_cast<uint8_t>(upper ? first : lower ? second : 16);
      configuration.bytes_per_row[tile] = 64;
    }
    // GCC believes that the instruction reads eight bytes, and may leave out the stores of the others.
    asm volatile("" : : "r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
  }

  // Gives the registers back: the system then saves less at each switch of threads.
  static void release() {
    current() = 0;
    _tile_release();
  }

 private:
  static int& current() {
    thread_local int rows = 0;
    return rows;
  }

  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);
};

// As `kAhead`, but lines are used, and asked for, two kilobytes at a time.
constexpr long kAheadOfTiles = 3584;

// The product of `multiply`.
// Tiles 0 and 1: sums of the upper rows, left and right columns; 2 and 3: of the lower rows; 4 and 5: rows of A;
// 6 and 7: columns of B.
inline void multiply_amx(int rows, int inner, const BFloat16* a, int a_stride, const BFloat16* const* segments,
                         int segment_count, int b_stride, float* c, int c_stride, bool streamed) {
  constexpr int kTile = 16, kDepth = 32;
  // Few rows wait for memory. More of them take so long that the panel behind this one can come meanwhile.
  const long ahead = rows <= kTile ? kAheadOfTiles : 64L * inner;
  const long a_bytes = 2L * a_stride, b_bytes = 2L * b_stride, c_bytes = 4L * c_stride;
  for (int first = 0; first < rows; first += 2 * kTile) {
    const int count = rows - first < 2 * kTile ? rows - first : 2 * kTile;
    const bool two = count > kTile;
    const BFloat16 *upper = a + static_cast<long>(first) * a_stride,
                   *lower = upper + static_cast<long>(kTile) * a_stride;
    float *upper_sums = c + static_cast<long>(first) * c_stride,
          *lower_sums = upper_sums + static_cast<long>(kTile) * c_stride;
    TileShape::set(count);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int segment = 0; segment < segment_count; ++segment) {
      const BFloat16 *lines = segments[segment], *above = upper + segment * inner, *below = lower + segment * inner;
      for (int k = 0; k < inner; k += kDepth, lines += kDepth / 2 * b_stride) {
        _tile_loadd(6, lines, b_bytes);
        _tile_loadd(7, lines + 2 * kLanes, b_bytes);
        if (streamed && first == 0) prefetch(lines, ahead, 64L * kDepth);
        _tile_loadd(4, above + k, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
          _tile_loadd(5, below + k, a_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, upper_sums, c_bytes);
    _tile_stored(1, upper_sums + kLanes, c_bytes);
    if (two) {
      _tile_stored(2, lower_sums, c_bytes);
      _tile_stored(3, lower_sums + kLanes, c_bytes);
    }
  }
}

}  // namespace fermata
