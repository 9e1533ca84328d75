// The form of a call's arguments, asked of the tensors by DLPack's C exchange API: a Python attribute
// of each costs ten times as much.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dla {

namespace py = pybind11;

// Of dlpack.h, version 1.
struct DlTensor {
  void* data;
  struct {
    std::int32_t type, index;
  } device;
  std::int32_t dims;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct DlExchange {
  struct {
    std::uint32_t major, minor;
  } version;
  void* older;
  void* not_used[3];
  int (*tensor)(void* object, DlTensor* tensor);
};

// Describes the leading arguments of a call: tensors, lists of tensors, None.
class Forms {
 public:
  // exchange: torch.Tensor.__dlpack_c_exchange_api__; types: Tensor, Parameter.
  Forms(const py::capsule& exchange, py::tuple types)
      : exchange_(static_cast<const DlExchange*>(exchange.get_pointer())),
        types_(std::move(types)),
        is_neg_(PyUnicode_InternFromString("is_neg")) {
    if (exchange_->version.major != 1) throw std::invalid_argument("exchange: expected version 1");
  }

  // As bytes; None if there is anything else among them, or a tensor that stands for its negative.
  py::object operator()(const py::tuple& args, std::size_t count) {
    std::string form;
    form.reserve(2048);
    for (std::size_t i = 0; i < count; ++i)
      if (!describe(PyTuple_GET_ITEM(args.ptr(), static_cast<Py_ssize_t>(i)), form))
        return py::none();
    return py::bytes(form);
  }

 private:
  bool describe(PyObject* value, std::string& form) {
    if (value == Py_None) {
      put(form, 'n');
      return true;
    }
    if (!PyList_CheckExact(value) && !PyTuple_CheckExact(value)) return describe_tensor(value, form);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
    put(form, 'l');
    put(form, count);
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!describe_tensor(PySequence_Fast_GET_ITEM(value, i), form)) return false;
    return true;
  }

  bool describe_tensor(PyObject* value, std::string& form) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    const Py_ssize_t known = PyTuple_GET_SIZE(types_.ptr());
    Py_ssize_t index = 0;
    while (index < known && PyTuple_GET_ITEM(types_.ptr(), index) != type) ++index;
    if (index == known) return false;
    DlTensor tensor;
    if (exchange_->tensor(value, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (index == 0) {  // parameters never are
      PyObject* const negative = PyObject_CallMethodNoArgs(value, is_neg_);
      Py_XDECREF(negative);
      if (negative != Py_False) {
        PyErr_Clear();
        return false;
      }
    }
    put(form, 't');
    put(form, tensor.device);
    put(form, tensor.dtype);
    put(form, tensor.dims);
    for (int i = 0; i < tensor.dims; ++i) {
      put(form, tensor.shape[i]);
      put(form, tensor.strides[i]);
    }
    return true;
  }

  template <class T>
  static void put(std::string& form, const T& value) {
    form.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  const DlExchange* exchange_;
  py::tuple types_;
  PyObject* is_neg_;
};

}  // namespace dla
