// As many numbers at a time as a register holds, in the compiler's own vectors.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16;
#else
constexpr int64_t WIDTH = 8;  // wider ones would go through memory
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Lanes __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

#ifdef __AVX512F__
constexpr Lanes LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr Lanes LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

template <class Vector, class Element>
inline Vector load(const Element* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats widen(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline float widen_one(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  return load<float>(&bits);
}

// To the nearest bfloat16, ties to even; NaN stays NaN, and quiet.
inline Halves narrow(Floats floats) {
  Words bits = (Words)floats, nan = (Words)(Lanes)(floats != floats);
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), Halves);
}

inline uint16_t narrow_one(float value) {
  uint32_t bits = load<uint32_t>(&value);
  return value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline void store(uint16_t* to, Halves halves) { std::memcpy(to, &halves, sizeof halves); }

// The same of fp32, which is as wide as it gets.

inline Floats widen(const float* from) { return load<Floats>(from); }
inline float widen_one(float value) { return value; }

inline void put(uint16_t* to, Floats floats) { store(to, narrow(floats)); }
inline void put(float* to, Floats floats) { std::memcpy(to, &floats, sizeof floats); }
inline void put_one(uint16_t* to, float value) { *to = narrow_one(value); }
inline void put_one(float* to, float value) { *to = value; }
