// CUDA on a CPU, for tests: enough of it to run our kernels as plain C++, and to notice what a GPU
// would let pass. Included in place of the CUDA headers by csrc/common/cuda/device.h.
//
// The blocks of a grid run one after the other, the threads of a block as fibers of one thread,
// both in an order shuffled by the environment variable DLA_EMULATION_SEED. A fiber runs until it
// has to wait for others. Noticed are
//   - shared memory: accesses out of bounds, reads of what nobody wrote, and races: two threads at
//     one element, one of them writing, without a barrier in between; accesses of what an
//     asynchronous copy is on its way to; more of it than a block may have;
//   - warps: masks without the lane itself, lanes that disagree or never come, sources out of mask;
//   - barriers that some threads never reach, and 16-byte accesses of unaligned addresses;
//   - global memory out of bounds, in a build with AddressSanitizer.
// A kernel that does such a thing ends with std::logic_error from launch().
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 64 * 1024;
inline constexpr char kSyncWarp[] = "__syncwarp";
// Shared memory of a block, as on GPUs of compute capability 7.5: altogether, and what the kernel
// itself may declare of it.
constexpr std::size_t kMostSharedBytes = 64 * 1024, kMostDeclaredBytes = 48 * 1024;
constexpr std::size_t kPackBytes = 16;

// Blocks and threads run in an order that the environment variable shuffles.
inline unsigned seed() {
  const char* value = std::getenv("DLA_EMULATION_SEED");
  return value == nullptr ? 1 : static_cast<unsigned>(std::atoi(value));
}

// ---- fibers -------------------------------------------------------------------------------------

// A stack and where its execution stands. Tells AddressSanitizer of every change of stacks. After its
// first entry a stack is changed to by the compiler's jumps: swapcontext asks the kernel for signal
// masks, which takes longer than all the rest, and AddressSanitizer forgets a stack that longjmp leaves.
class Context {
 public:
  void switch_to(Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    void* mine = nullptr;
    __sanitizer_start_switch_fiber(&mine, to.stack_, to.size_);
    to.from_ = this;
#endif
    left_before_ = true;
    if (__builtin_setjmp(left_) == 0) enter(to);
#if defined(__SANITIZE_ADDRESS__)
    arrive(mine);
#endif
  }

  // What every stack has to do when it runs again, or (null) for the first time.
  void arrive([[maybe_unused]] void* mine) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(mine, &from_->stack_, &from_->size_);
#endif
  }

 protected:
  ucontext_t context_ = {};
  const void* stack_ = nullptr;
  std::size_t size_ = 0;
  Context* from_ = nullptr;

 private:
  // Apart from the setjmp, as its manual wants it; AddressSanitizer would clear the stack here.
  [[gnu::noinline, gnu::no_sanitize_address]] static void enter(Context& to) {
    if (to.left_before_) __builtin_longjmp(to.left_, 1);
    setcontext(&to.context_);
  }

  void* left_[5] = {};
  bool left_before_ = false;
};

class SharedMemory;

// A pack on its way to shared memory, until the thread waits for it.
struct Copy {
  SharedMemory* memory;
  std::size_t offset;  // in bytes
};

enum class Waits { not_at_all, at_barrier, in_warp, for_the_next_block };

// One CUDA thread. Its fiber is used again for block after block.
struct Thread : Context {
  explicit Thread(void (*entry)()) : memory(new char[kStackBytes]) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory.get();
    context_.uc_stack.ss_size = kStackBytes;
    stack_ = memory.get();
    size_ = kStackBytes;
    makecontext(&context_, entry, 0);
  }

  std::unique_ptr<char[]> memory;
  dim3 index;
  int number = 0;  // in the block
  Waits waits = Waits::for_the_next_block;
  std::vector<Copy> copies;
  // The warp operation that it takes part in.
  const char* operation = nullptr;
  unsigned mask = 0;
  int source = 0;
  std::uint64_t value = 0, result = 0;

  int lane() const { return number % kWarp; }
  int warp() const { return number / kWarp; }
};

// ---- blocks -------------------------------------------------------------------------------------

class Machine {
 public:
  static Machine& instance() {
    static thread_local Machine machine;
    return machine;
  }

  void run(dim3 grid, dim3 block, std::size_t shared_bytes, std::function<void()> kernel) {
    if (block.y != 1 || block.z != 1 || grid.y != 1 || grid.z != 1 || block.x % kWarp != 0)
      throw std::logic_error("emulation: grids of one dimension and whole warps only");
    if (shared_bytes > kMostSharedBytes)
      throw std::logic_error("emulation: " + too_much(shared_bytes, kMostSharedBytes));
    ::gridDim = grid;
    ::blockDim = block;
    kernel_ = std::move(kernel);
    dynamic_bytes_ = shared_bytes;
    random_.seed(seed());
    while (threads_.size() < block.x) threads_.push_back(std::make_unique<Thread>(&fiber));
    warp_epochs_.assign(block.x / kWarp, 0);
    std::vector<unsigned> order(grid.x);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_);
    for (unsigned index : order) run_block(index, static_cast<int>(block.x));
  }

  // Of the running thread: __syncthreads.
  void barrier() {
    current_->waits = Waits::at_barrier;
    current_->switch_to(scheduler_);
  }

  // Of the running thread: an operation of the lanes in `mask`, which returns the value of the lane
  // `source`; votes return the lanes whose value is not 0.
  std::uint64_t together(const char* operation, unsigned mask, std::uint64_t value, int source) {
    Thread& self = *current_;
    if ((mask >> self.lane() & 1) == 0)
      fail(std::string(operation) + ": the lane is not in its own mask");
    self.operation = operation;
    self.mask = mask;
    self.value = value;
    self.source = source;
    self.waits = Waits::in_warp;
    if (all_lanes_came(self)) {
      finish_together(self);
    } else {
      self.switch_to(scheduler_);
    }
    return self.result;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::logic_error(place(*current_) + what);
  }

  // Of the running thread: its kernel declares so much shared memory, besides the dynamic.
  void declare_shared(std::size_t bytes) {
    declared_bytes_ += bytes;
    if (declared_bytes_ > kMostDeclaredBytes) fail(too_much(declared_bytes_, kMostDeclaredBytes));
    const std::size_t all = declared_bytes_ + dynamic_bytes_;
    if (all > kMostSharedBytes) fail(too_much(all, kMostSharedBytes));
  }

  Thread& current() const { return *current_; }
  std::uint64_t block_serial() const { return block_serial_; }
  std::uint32_t block_epoch() const { return block_epoch_; }
  std::uint32_t warp_epoch(int thread) const {
    return warp_epochs_[static_cast<std::size_t>(thread / kWarp)];
  }
  std::size_t dynamic_bytes() const { return dynamic_bytes_; }

 private:
  void run_block(unsigned index, int threads) {
    ::blockIdx.x = index;
    ++block_serial_;
    declared_bytes_ = 0;
    ready_.clear();
    for (int i = 0; i < threads; ++i) {
      Thread& thread = *threads_[static_cast<std::size_t>(i)];
      thread.number = i;
      thread.index.x = static_cast<unsigned>(i);
      thread.copies.clear();
      make_ready(thread);
    }
    for (running_ = threads; running_ > 0;) {
      while (!ready_.empty()) resume(any_ready());
      if (running_ > 0) release_barrier();
    }
  }

  Thread& any_ready() {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    Thread& thread = *ready_.back();
    ready_.pop_back();
    return thread;
  }

  void make_ready(Thread& thread) {
    thread.waits = Waits::not_at_all;
    ready_.push_back(&thread);
  }

  void resume(Thread& thread) {
    current_ = &thread;
    ::threadIdx = thread.index;
    scheduler_.switch_to(thread);
    if (failure_ == nullptr) return;
    threads_.clear();  // they will never go on
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  // The body of every fiber: thread after thread.
  static void fiber() {
    Machine& machine = instance();
    machine.current_->arrive(nullptr);
    for (;;) {
      try {
        machine.kernel_();
      } catch (...) {
        machine.failure_ = std::current_exception();
      }
      machine.current_->waits = Waits::for_the_next_block;
      --machine.running_;
      machine.current_->switch_to(machine.scheduler_);
    }
  }

  // Nobody can go on. Fine if all threads are at the barrier.
  void release_barrier() {
    const std::size_t threads = ::blockDim.x;
    for (std::size_t i = 0; i < threads; ++i) {
      const Thread& thread = *threads_[i];
      if (thread.waits == Waits::in_warp) give_up(thread, waited_for(thread));
      if (thread.waits == Waits::for_the_next_block)
        give_up(thread, "ended, and others wait for it at a barrier");
    }
    ++block_epoch_;
    for (std::size_t i = 0; i < threads; ++i) make_ready(*threads_[i]);
  }

  std::string waited_for(const Thread& thread) {
    std::string lanes;
    for (int lane = 0; lane < kWarp; ++lane)
      if (thread.mask >> lane & 1 && !takes_part(thread, lane)) lanes += " " + std::to_string(lane);
    return std::string(thread.operation) + " waits for ever for lanes" + lanes;
  }

  [[noreturn]] void give_up(const Thread& thread, const std::string& why) {
    const std::string where = place(thread);
    threads_.clear();  // they will never go on
    throw std::logic_error(where + why);
  }

  static std::string place(const Thread& thread) {
    return "block " + std::to_string(::blockIdx.x) + ", thread " + std::to_string(thread.number) +
           ": ";
  }

  static std::string too_much(std::size_t bytes, std::size_t most) {
    return std::to_string(bytes) + " bytes of shared memory, more than " + std::to_string(most);
  }

  Thread& lane_of(const Thread& thread, int lane) {
    return *threads_[static_cast<std::size_t>(thread.warp() * kWarp + lane)];
  }

  bool takes_part(const Thread& thread, int lane) {
    const Thread& other = lane_of(thread, lane);
    return other.waits == Waits::in_warp && other.operation == thread.operation &&
           other.mask == thread.mask;
  }

  bool all_lanes_came(const Thread& thread) {
    for (int lane = 0; lane < kWarp; ++lane)
      if (thread.mask >> lane & 1 && !takes_part(thread, lane)) return false;
    return true;
  }

  void finish_together(Thread& self) {
    if (self.operation == kSyncWarp && self.mask == ~0u)
      ++warp_epochs_[static_cast<std::size_t>(self.warp())];
    std::uint64_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      if (self.mask >> lane & 1 && lane_of(self, lane).value != 0) votes |= 1ull << lane;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((self.mask >> lane & 1) == 0) continue;
      Thread& thread = lane_of(self, lane);
      if (thread.source < 0) {
        thread.result = votes;
      } else {
        if ((self.mask >> thread.source & 1) == 0)
          fail(std::string(self.operation) + ": lane " + std::to_string(lane) + " reads lane " +
               std::to_string(thread.source) + ", which is not in the mask");
        thread.result = lane_of(self, thread.source).value;
      }
      if (&thread != &self) make_ready(thread);
    }
    self.waits = Waits::not_at_all;
  }

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> ready_;
  std::vector<std::uint32_t> warp_epochs_;
  Context scheduler_;
  Thread* current_ = nullptr;
  int running_ = 0;
  std::uint64_t block_serial_ = 0;
  std::uint32_t block_epoch_ = 0;
  std::size_t dynamic_bytes_ = 0, declared_bytes_ = 0;
  std::exception_ptr failure_;
  std::mt19937 random_;
};

// ---- shared memory ------------------------------------------------------------------------------

// Who touched an element of shared memory last, and when.
struct Access {
  std::int32_t thread = -1;
  std::uint32_t block_epoch = 0, warp_epoch = 0;

  static Access now() {
    const Machine& machine = Machine::instance();
    const int thread = machine.current().number;
    return {thread, machine.block_epoch(), machine.warp_epoch(thread)};
  }
  // Whether a barrier (of the block, or of the warp that both are in) lies in between.
  bool ordered_before(const Access& later) const {
    if (thread < 0 || thread == later.thread || block_epoch != later.block_epoch) return true;
    return same_warp(later) && warp_epoch != later.warp_epoch;
  }
  bool same_warp(const Access& other) const { return thread / kWarp == other.thread / kWarp; }
};

// Shared memory, fresh in every block. Views of different types may share it: what is known of it
// is kept for units as large as the smallest of these types.
class SharedMemory {
 public:
  // Before a view of elements of `unit` bytes. Whether it is the first in the block.
  bool view(std::size_t bytes, std::size_t unit) {
    const auto block = Machine::instance().block_serial();
    if (block == block_) {
      if (unit < unit_) refine(unit);
      return false;
    }
    block_ = block;
    unit_ = unit;
    values_.resize(bytes);
    units_.assign((bytes + unit - 1) / unit, {});
    return true;
  }

  template <class T>
  T read(std::ptrdiff_t i) {
    const Access now = Access::now();
    for (Unit& unit : units_of<T>(i, "reads")) {
      if (unit.written.thread < 0) fail<T>("reads", i, "which nobody wrote");
      if (unit.arriving) fail<T>("reads", i, "which a copy is on its way to");
      if (!unit.written.ordered_before(now)) fail<T>("reads", i, "while another thread writes it");
      unit.add_reader(now);
    }
    T value;
    std::memcpy(&value, values_.data() + i * sizeof(T), sizeof(T));
    return value;
  }

  template <class T>
  void write(std::ptrdiff_t i, T value, bool arriving = false) {
    const Access now = Access::now();
    for (Unit& unit : units_of<T>(i, "writes")) {
      if (unit.arriving) fail<T>("writes", i, "which a copy is on its way to");
      for (const Access& before : {unit.written, unit.read, unit.other_read})
        if (!before.ordered_before(now)) fail<T>("writes", i, "while another thread uses it");
      unit.written = now;
      unit.arriving = arriving;
    }
    std::memcpy(values_.data() + i * sizeof(T), &value, sizeof(T));
  }

  // A pack that the running thread had copied and has waited for.
  void arrive(std::size_t offset) {
    for (Unit& unit : std::span(units_).subspan(offset / unit_, kPackBytes / unit_)) {
      unit.written = Access::now();
      unit.arriving = false;
    }
  }

 private:
  struct Unit {
    Access written, read, other_read;
    bool arriving = false;

    // Of all readers two are kept: the last one may be the next to write, and a barrier of its warp
    // says nothing about readers in other warps.
    void add_reader(const Access& now) {
      const bool other_counts = !other_read.same_warp(now) && !other_read.ordered_before(now);
      if (read.thread != now.thread && !other_counts) other_read = read;
      read = now;
    }
  };

  void refine(std::size_t unit) {
    std::vector<Unit> finer((values_.size() + unit - 1) / unit);
    for (std::size_t i = 0; i < finer.size(); ++i) finer[i] = units_[i * unit / unit_];
    units_ = std::move(finer);
    unit_ = unit;
  }

  template <class T>
  std::span<Unit> units_of(std::ptrdiff_t i, const char* verb) {
    if (i < 0 || static_cast<std::size_t>(i) >= values_.size() / sizeof(T))
      fail<T>(verb, i, "which is out of bounds");
    return std::span(units_).subspan(i * sizeof(T) / unit_, sizeof(T) / unit_);
  }

  template <class T>
  [[noreturn]] void fail(const char* verb, std::ptrdiff_t i, const char* why) const {
    Machine::instance().fail(std::string(verb) + " shared memory [" + std::to_string(i) + "] of " +
                             std::to_string(values_.size() / sizeof(T)) + ", " + why);
  }

  std::vector<std::byte> values_;
  std::vector<Unit> units_;
  std::size_t unit_ = 0;  // bytes
  std::uint64_t block_ = 0;
};

// An access of 16 bytes, which faults on a GPU when the address is not aligned.
inline void check_aligned(std::uintptr_t address) {
  if (address % kPackBytes != 0)
    Machine::instance().fail("16-byte access of an unaligned address");
}
inline void check_aligned(const void* p) { check_aligned(reinterpret_cast<std::uintptr_t>(p)); }

// A pointer to shared memory.
template <class T>
class Shared {
 public:
  class Element {
   public:
    Element(SharedMemory* memory, std::ptrdiff_t i) : memory_(memory), i_(i) {}
    operator T() const { return memory_->read<T>(i_); }
    const Element& operator=(T value) const {
      memory_->write<T>(i_, value);
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
    const Element& operator+=(T value) const { return *this = static_cast<T>(*this) + value; }

   private:
    SharedMemory* memory_;
    std::ptrdiff_t i_;
  };

  explicit Shared(SharedMemory* memory, std::ptrdiff_t offset = 0)
      : memory_(memory), offset_(offset) {}
  Element operator[](std::ptrdiff_t i) const { return {memory_, offset_ + i}; }
  Shared operator+(std::ptrdiff_t i) const { return Shared(memory_, offset_ + i); }

  std::uintptr_t address() const { return static_cast<std::uintptr_t>(offset_) * sizeof(T); }
  // Puts a pack on its way here, until wait_for_copies.
  void copy(const T* from) const {
    for (std::size_t e = 0; e < kPackBytes / sizeof(T); ++e)
      memory_->write<T>(offset_ + e, from[e], true);
    Machine::instance().current().copies.push_back({memory_, address()});
  }

 private:
  SharedMemory* memory_;
  std::ptrdiff_t offset_;
};

// Of the running thread: what it has copied is there; for other threads, after a barrier.
inline void wait_for_copies() {
  std::vector<Copy>& copies = Machine::instance().current().copies;
  for (const Copy& copy : copies) copy.memory->arrive(copy.offset);
  copies.clear();
}

// An array that the kernel declares.
template <class T>
Shared<T> declared_shared(SharedMemory& memory, std::size_t count) {
  if (memory.view(count * sizeof(T), sizeof(T)))
    Machine::instance().declare_shared(count * sizeof(T));
  return Shared<T>(&memory);
}

inline SharedMemory& dynamic_memory() {
  static thread_local SharedMemory memory;
  return memory;
}

// All of the dynamic shared memory that the launch asked for.
template <class T>
Shared<T> dynamic_shared() {
  dynamic_memory().view(Machine::instance().dynamic_bytes(), sizeof(T));
  return Shared<T>(&dynamic_memory());
}

// ---- warps --------------------------------------------------------------------------------------

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source) {
  const int lane = Machine::instance().current().lane();
  if (source < 0 || source >= kWarp) source = lane;
  return from_bits<T>(Machine::instance().together(operation, mask, to_bits(value), source));
}

inline int lane() { return Machine::instance().current().lane(); }

}  // namespace emulation

inline void __syncthreads() { emulation::Machine::instance().barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::Machine::instance().together(emulation::kSyncWarp, mask, 0, -1);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle("__shfl_sync", mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::lane() ^ lane_mask);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  return emulation::shuffle("__shfl_down_sync", mask, value, emulation::lane() + delta);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulation::Machine::instance().together(
      "__ballot_sync", mask, predicate != 0, -1));
}
