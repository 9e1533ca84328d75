// Numbers of elements, and of the blocks that they are cut into.
#pragma once

#include <cstdint>

namespace dla::DLA_ISA {

using Size = std::int64_t;

constexpr Size ceil_div(Size a, Size b) { return (a + b - 1) / b; }
constexpr Size round_up(Size a, Size b) { return ceil_div(a, b) * b; }

}  // namespace dla::DLA_ISA
