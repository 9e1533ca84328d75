// From the DType of an argument struct to the C++ type of its elements.
#pragma once

#include <stdexcept>

#include "args.h"
#include "simd.h"

namespace dla::DLA_ISA {

// Calls body(T{}) with T the element type of `dtype`.
template <class Body>
void with_element_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::f16: return body(Half{});
    case DType::bf16: return body(BFloat16{});
  }
  throw std::invalid_argument("dtype: expected 0 (f32), 1 (f64), 2 (f16) or 3 (bf16)");
}

}  // namespace dla::DLA_ISA
