// Sixteen floats at a time, in the compiler's own vector types: one source for every CPU. What a lane holds depends on
// its own input alone, so that a value never depends on its place in a row (R23); sums are taken lane by lane and then
// over the lanes, in an order that only the length decides.
//
// Knows numbers; nothing of models.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fermata {

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// The upper half of a float32: 8 bits of mantissa with the hidden one.
struct BFloat16 {
  uint16_t bits;
};

// Elements that one lane of a matrix product takes at a time; operands are laid out in groups of so many.
template <class Element>
constexpr int kPair = sizeof(Element) == 2 ? 2 : 1;

inline Floats all(float value) { return value - Floats{}; }  // unlike 0 + x, x - 0 is x and costs nothing
inline Floats load(const float* source) {
  Floats value;
  std::memcpy(&value, source, sizeof value);
  return value;
}
inline void store(float* target, Floats value) { std::memcpy(target, &value, sizeof value); }

template <class To, class From>
inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline Floats select(Integers condition, Floats yes, Floats no) { return condition ? yes : no; }
inline Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }

// Rounds to nearest, ties to even; what is no number stays so.
inline Halves narrow(Floats value) {
#if defined(__AVX512BF16__)
  return bits_of<Halves>(_mm512_cvtneps_pbh(bits_of<__m512>(value)));
#else
  const Words bits = bits_of<Words>(value);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Words quiet = bits | 0x400000;
  const Words number = bits_of<Words>(value == value);
  return __builtin_convertvector(((rounded & number) | (quiet & ~number)) >> 16, Halves);
#endif
}

inline void store(BFloat16* target, Floats value) {
  const Halves halves = narrow(value);
  std::memcpy(target, &halves, sizeof halves);
}
inline Floats load(const BFloat16* source) {
  Halves halves;
  std::memcpy(&halves, source, sizeof halves);
  return bits_of<Floats>(__builtin_convertvector(halves, Words) << 16);
}

template <class Element>
inline Element round_to(float value);
template <>
inline float round_to<float>(float value) {
  return value;
}
template <>
inline BFloat16 round_to<BFloat16>(float value) {
  return BFloat16{narrow(all(value))[0]};
}

// Asks for so many bytes of memory that will be read soon, from so far behind a place on, into the second-level cache.
// Whether there is any memory is all the same.
inline void prefetch(const void* place, long ahead, long bytes) {
  for (long offset = ahead; offset < ahead + bytes; offset += 64)
    __builtin_prefetch(static_cast<const char*>(place) + offset, 0, 2);
}

typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

// Joins the upper half of a vector with the lower one, then the quarters, and so on.
template <class Join>
inline float reduce(Floats value, const Join& join) {
  Floats8 eight[2];
  std::memcpy(eight, &value, sizeof eight);
  const Floats8 joined = join(eight[0], eight[1]);
  Floats4 four[2];
  std::memcpy(four, &joined, sizeof four);
  const Floats4 last = join(four[0], four[1]);
  return join(join(last[0], last[2]), join(last[1], last[3]));
}

inline float sum(Floats value) {
  return reduce(value, [](auto a, auto b) { return a + b; });
}
inline float largest(Floats value) {
  return reduce(value, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to about one unit in the last place: a power of two times a polynomial of degree 6 over ±ln(2)/2 (the
// coefficients of Cephes' expf). Exactly 1 at 0 and exactly 0 below the smallest normal result.
inline Floats exponential(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = select(x > 89.0f, all(89.0f), x);  // gives infinity
  const Floats rounded = x * 1.44269504088896341f + kMagic;
  const Floats power = rounded - kMagic;
  const Floats r = (x - power * 0.693359375f) - power * -2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers exponent = bits_of<Integers>(rounded) - bits_of<int32_t>(kMagic) + 127;
  return select(x < -87.0f, Floats{}, p * bits_of<Floats>(exponent << 23));
}

// tanh: an odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel (coefficients of Cephes' tanhf).
inline Floats hyperbolic_tangent(Floats x) {
  const Floats square = x * x;
  Floats p = all(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const Floats near = p * square * x + x;
  const Floats far = 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f);
  return select((x < 0.625f) & (x > -0.625f), near, far);
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// The tanh form of the Gaussian error linear unit (Hendrycks and Gimpel 2016).
inline Floats gelu_tanh(Floats x) {
  const Floats inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}

}  // namespace fermata
