// The C++ types of features, and the way to them from the DType of an argument struct.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "args.h"

namespace dla {

// Storage-only feature types: arithmetic happens in Compute<T>.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Bytes of an element.
inline std::int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// The elements of an array in an argument struct.
template <class T>
const T* as(const void* array) {
  return static_cast<const T*>(array);
}
template <class T>
T* as(void* array) {
  return static_cast<T*>(array);
}

// Whether there is code for doubles in this translation unit; common/isa.h says why not.
#ifndef __AVX512F__
#define DLA_DOUBLES
constexpr bool kDoubles = true;
#else
constexpr bool kDoubles = false;
#endif

// Calls body(T{}) with T the element type of `dtype`.
template <class Body>
void with_element_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64:
      if constexpr (kDoubles) return body(double{});
      break;
    case DType::f16: return body(Half{});
    case DType::bf16: return body(BFloat16{});
  }
  throw std::invalid_argument("dtype: expected 0 (f32), 1 (f64), 2 (f16) or 3 (bf16)");
}

// Calls body(A{}) with A the compute type of `dtype`.
template <class Body>
void with_compute_type(DType dtype, Body&& body) {
  if constexpr (kDoubles)
    if (dtype == DType::f64) return body(double{});
  body(float{});
}

}  // namespace dla
