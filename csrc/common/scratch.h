// Working memory that a thread keeps between calls: fresh pages cost more than the arithmetic on
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "common/sizes.h"

namespace dla::DLA_ISA {

// A block that only grows. One user at a time: reserve() may move the block and what it held is
// lost.
class Scratch {
 public:
  static constexpr std::size_t kAlignment = 64;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // Room for `count` elements, aligned to a cache line. What they are is not said; but they have been
  // written once: a masked load beside memory without a page takes hundreds of cycles.
  template <class A>
  A* reserve(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(A);
    if (bytes > size_) {
      release();
      block_ = ::operator new(bytes, std::align_val_t{kAlignment});
      std::memset(block_, 0, bytes);
      size_ = bytes;
    }
    return static_cast<A*>(block_);
  }

 private:
  void release() {
    if (block_ != nullptr) ::operator delete(block_, std::align_val_t{kAlignment});
    block_ = nullptr;
    size_ = 0;
  }

  void* block_ = nullptr;
  std::size_t size_ = 0;
};

// Parts of such a block, each of them aligned to a cache line.
class Arena {
 public:
  // Room for `bytes`, none of it taken.
  void reserve(std::size_t bytes) {
    free_ = scratch_.reserve<char>(static_cast<std::int64_t>(bytes));
  }
  template <class E>
  E* take(std::int64_t count) {
    E* out = reinterpret_cast<E*>(free_);
    free_ += bytes_of<E>(count);
    return out;
  }
  // What `count` elements take.
  template <class E>
  static std::size_t bytes_of(std::int64_t count) {
    return static_cast<std::size_t>(
        round_up(count * static_cast<std::int64_t>(sizeof(E)), Scratch::kAlignment));
  }

 private:
  Scratch scratch_;
  char* free_ = nullptr;
};

// The call's [B, C]-sized working memory, kept by the calling thread.
template <class A>
class Buffers {
 public:
  explicit Buffers(std::int64_t elements) { block_ = scratch().template reserve<A>(elements); }
  A* take(std::int64_t count) {
    A* out = block_;
    block_ += count;
    return out;
  }

 private:
  static Scratch& scratch() {
    thread_local Scratch scratch;
    return scratch;
  }
  A* block_;
};

}  // namespace dla::DLA_ISA
