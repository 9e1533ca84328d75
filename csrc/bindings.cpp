// The Python side of all compiled modules: what entries.h lists becomes functions. Tensors are asked for
// their address in Python: no torch headers, so one build serves every torch. Compiled once and linked
// to each module's own entries.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "entries.h"
#include "forms.h"
#include "unchanged.h"

namespace py = pybind11;

namespace dla {
namespace {

// ---- fields -------------------------------------------------------------------------------------

// Of a tensor (of an empty one, null), None, or an address as an int.
void* address_of(py::handle value) {
  if (value.is_none()) return nullptr;
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto number = py::reinterpret_steal<py::object>(
      PyLong_Check(value.ptr()) ? value.inc_ref().ptr()
                                : PyObject_CallMethodNoArgs(value.ptr(), data_ptr));
  if (!number) throw py::error_already_set();
  void* const address = PyLong_AsVoidPtr(number.ptr());
  if (address == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return address;
}

template <class T>
T from_python(py::handle value) {
  if constexpr (std::is_pointer_v<T>)
    return address_of(value);
  else
    return value.cast<T>();
}

template <class T>
void put(void* place, bool is_list, py::handle value) {
  if (!is_list) {
    const T converted = from_python<T>(value);
    std::memcpy(place, &converted, sizeof converted);  // which may be an enum there
    return;
  }
  std::vector<T> items;
  for (py::handle item : value) items.push_back(from_python<T>(item));
  *static_cast<std::vector<T>*>(place) = std::move(items);
}

void put(const Field& field, void* place, py::handle value) {
  switch (field.kind) {
    case Kind::source: return put<const void*>(place, field.is_list, value);
    case Kind::target: return put<void*>(place, field.is_list, value);
    case Kind::flag: return put<bool>(place, field.is_list, value);
    case Kind::int32: return put<int>(place, field.is_list, value);
    case Kind::int64: return put<std::int64_t>(place, field.is_list, value);
    case Kind::real: return put<double>(place, field.is_list, value);
  }
}

std::string text(py::handle value) { return value.cast<std::string>(); }

void assign(const Field& field, py::handle value, void* args) {
  try {
    put(field, static_cast<char*>(args) + field.offset, value);
  } catch (const py::cast_error&) {
    throw py::type_error(std::string("argument ") + field.name + ": cannot use " +
                         text(py::repr(value)));
  }
}

// ---- functions ----------------------------------------------------------------------------------

// An entry and, for each of its fields, the name as an interned string; for the life of the process.
struct Function {
  Entry entry;
  std::vector<PyObject*> names;

  explicit Function(const Entry& entry) : entry(entry) {
    for (const Field& field : entry.fields)
      names.push_back(PyUnicode_InternFromString(field.name));
  }

  // Wants every field by keyword.
  std::int64_t operator()(const py::kwargs& values) const {
    const std::shared_ptr<void> args = entry.make();
    for (std::size_t i = 0; i < names.size(); ++i) {
      PyObject* value = PyDict_GetItemWithError(values.ptr(), names[i]);
      if (value == nullptr)
        throw py::type_error(std::string("missing argument ") + entry.fields[i].name);
      assign(entry.fields[i], value, args.get());
    }
    if (values.size() != names.size()) throw py::type_error("unknown argument given");
    const py::gil_scoped_release released;
    return entry.call(args.get());
  }
};

// A call that is made time and again. Some of its arguments stay; others are taken from a tuple that
// is given and from a list that is filled.
class Repeat {
 public:
  // constants: by name. given, made: pairs of a name and the place, or list of places, in these.
  Repeat(std::shared_ptr<const Function> function, const py::dict& constants, const py::list& given,
         const py::list& made)
      : function_(std::move(function)),
        args_(function_->entry.make()),
        given_(sources(given)),
        made_(sources(made)) {
    for (const auto& [name, value] : constants) assign(find(name), value, args_.get());
    if (constants.size() + given.size() + made.size() != function_->names.size())
      throw py::type_error("missing argument");
  }

  void operator()(const py::tuple& given, const py::list& made) const {
    // For this call, on this thread.
    const std::shared_ptr<void> args = function_->entry.copy(args_.get());
    take(given_, PySequence_Fast_ITEMS(given.ptr()), args.get());
    take(made_, PySequence_Fast_ITEMS(made.ptr()), args.get());
    const py::gil_scoped_release released;
    function_->entry.call(args.get());
  }

 private:
  struct Source {
    Field field;
    bool is_list;
    std::vector<Py_ssize_t> places;
  };

  std::vector<Source> sources(const py::list& pairs) const {
    std::vector<Source> found;
    for (py::handle pair : pairs) {
      const py::object place = pair[py::int_(1)];
      Source source{find(pair[py::int_(0)]), PyList_Check(place.ptr()) != 0, {}};
      for (py::handle one : source.is_list ? py::list(place) : py::list(py::make_tuple(place)))
        source.places.push_back(PyLong_AsSsize_t(one.ptr()));
      found.push_back(std::move(source));
    }
    return found;
  }

  Field find(py::handle name) const {
    PyObject* interned = name.inc_ref().ptr();
    PyUnicode_InternInPlace(&interned);
    const auto owner = py::reinterpret_steal<py::object>(interned);
    const auto& names = function_->names;
    const auto found = std::find(names.begin(), names.end(), interned);
    if (found != names.end()) return function_->entry.fields[found - names.begin()];
    throw py::type_error("unknown argument " + text(name));
  }

  static void take(const std::vector<Source>& sources, PyObject* const* from, void* args) {
    for (const auto& [field, is_list, places] : sources) {
      if (!is_list) {
        assign(field, from[places[0]], args);
        continue;
      }
      py::list items;
      for (const Py_ssize_t place : places) items.append(py::handle(from[place]));
      assign(field, items, args);
    }
  }

  std::shared_ptr<const Function> function_;
  std::shared_ptr<void> args_;
  std::vector<Source> given_, made_;
};

void fill(py::module_& m) {
  m.doc() = "Native kernels of dla-kernels; call them through dla_kernels.ops.";
  for (const Fact& fact : facts()) m.def(fact.name, fact.tell);
  m.def("unchanged", &unchanged);
  py::class_<Forms>(m, "Forms", py::module_local())
      .def(py::init<py::capsule, py::object, py::object>())
      .def("__call__", &Forms::operator());
  py::class_<Repeat>(m, "Repeat", py::module_local()).def("__call__", &Repeat::operator());
  for (const Entry& entry : entries()) {
    const auto function = std::make_shared<const Function>(entry);
    m.def(entry.name, [function](const py::kwargs& values) { return (*function)(values); });
    m.def((std::string("repeat_") + entry.name).c_str(),
          [function](const py::dict& constants, const py::list& given, const py::list& made) {
            return Repeat(function, constants, given, made);
          });
  }
}

}  // namespace
}  // namespace dla

PYBIND11_MODULE(_dla_native, m) { dla::fill(m); }
PYBIND11_MODULE(_dla_native_cuda, m) { dla::fill(m); }
PYBIND11_MODULE(_dla_native_cuda_emulated, m) { dla::fill(m); }  // tests/emulation
