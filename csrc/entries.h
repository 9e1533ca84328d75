// What a compiled module offers: functions, each of one struct of arguments whose fields have names. Of
// Python nothing is known here, so that bindings.cpp, slow to compile, serves all modules.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace dla {

// What a field holds, or each item of it if it is a std::vector.
enum class Kind { source, target, flag, int32, int64, real };  // source, target: an address

struct Field {
  const char* name;
  std::size_t offset;
  Kind kind;
  bool is_list;
};

// With nothing left of the struct's type: whatever is generated anew for each of three hundred fields,
// or each of a dozen structs, is slow to compile.
struct Entry {
  const char* name;
  std::span<const Field> fields;
  std::shared_ptr<void> (*make)();
  std::shared_ptr<void> (*copy)(const void* args);
  std::int64_t (*call)(const void* args);  // 0 for void
};

// Something to know about a module.
struct Fact {
  const char* name;
  std::string (*tell)();
};

std::vector<Entry> entries();
std::vector<Fact> facts();

}  // namespace dla
