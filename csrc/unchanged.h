// Whether Python modules still hold what they held. In Python the loop takes three times as long.
#pragma once

#include <pybind11/pybind11.h>

namespace dla {

namespace py = pybind11;

// values: triples of a dict (None: `owner`), a key, and the value (None also if it is missing).
// empty: pairs of a dict and a key, whose value is to be an empty container.
// types: pairs of an object and its type. All flat.
inline bool unchanged(const py::dict& owner, const py::list& values, const py::list& empty,
                      const py::list& types) {
  const auto item = [](const py::list& from, std::size_t i) {
    return PyList_GET_ITEM(from.ptr(), static_cast<Py_ssize_t>(i));
  };
  const auto look_up = [](PyObject* dict, PyObject* key) {
    PyObject* const found = PyDict_GetItemWithError(dict, key);
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return found == nullptr ? Py_None : found;
  };
  for (std::size_t i = 0; i < values.size(); i += 3) {
    PyObject* const dict = item(values, i);
    if (look_up(dict == Py_None ? owner.ptr() : dict, item(values, i + 1)) != item(values, i + 2))
      return false;
  }
  for (std::size_t i = 0; i < empty.size(); i += 2)
    if (PyObject_Not(look_up(item(empty, i), item(empty, i + 1))) != 1) return false;
  for (std::size_t i = 0; i < types.size(); i += 2)
    if (!Py_IS_TYPE(item(types, i), reinterpret_cast<PyTypeObject*>(item(types, i + 1))))
      return false;
  return true;
}

}  // namespace dla
