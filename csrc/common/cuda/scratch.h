// Working memory of steps of many launches, which the caller allocates.
#pragma once

#include "common/cuda/map.h"
#include "common/dtype.h"

namespace dla::cuda {

// Hands it out bit by bit; without any it is only counted.
template <class A>
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<A*>(memory)) {}

  A* take(Size count) {
    A* taken = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += ceil_div(count, kWarp) * kWarp;
    return taken;
  }
  Size used() const { return used_; }

 private:
  A* memory_;
  Size used_ = 0;
};

// Elements of the compute type that a step takes when it is made; `args.scratch` is not looked at.
template <template <class> class Step, class Args>
std::int64_t scratch_of(Args args) {
  std::int64_t size = 0;
  args.scratch = nullptr;
  with_element_type(args.dtype, [&](auto element) {
    size = Step<decltype(element)>(args).scratch.used();
  });
  return size;
}

}  // namespace dla::cuda
