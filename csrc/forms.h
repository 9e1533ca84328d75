// The form of a call's arguments, asked of the tensors by DLPack's C exchange API: a Python attribute
// of each costs ten times as much.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

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
  // exchange: torch.Tensor.__dlpack_c_exchange_api__. Other types than the two are unusual.
  Forms(const py::capsule& exchange, py::object tensor, py::object parameter)
      : exchange_(static_cast<const DlExchange*>(exchange.get_pointer())),
        tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        is_neg_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("is_neg"))) {
    if (exchange_->version.major != 1 || exchange_->tensor == nullptr)
      throw std::invalid_argument("exchange: expected version 1 of the interface, whole");
  }

  // As bytes. None if anything else is among the arguments, or a tensor that stands for its negative;
  // else empty if a tensor has no such form: sparse, nested, without memory.
  py::object operator()(const py::tuple& args, std::size_t count) const {
    if (args.size() < count) throw py::type_error("fewer arguments than tensors");
    std::string form;
    form.reserve(2048);
    bool all_formed = true;
    const auto add = [&](PyObject* value) {
      const Found found = describe(value, form);
      all_formed = all_formed && found == Found::form;
      return found != Found::unusual;
    };
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* const value = PyTuple_GET_ITEM(args.ptr(), static_cast<Py_ssize_t>(i));
      if (value == Py_None) {
        put(form, 'n');
      } else if (PyList_CheckExact(value) || PyTuple_CheckExact(value)) {
        const Py_ssize_t length = PySequence_Fast_GET_SIZE(value);
        put(form, 'l');
        put(form, length);
        for (Py_ssize_t j = 0; j < length; ++j)
          if (!add(PySequence_Fast_GET_ITEM(value, j))) return py::none();
      } else if (!add(value)) {
        return py::none();
      }
    }
    return all_formed ? py::bytes(form) : py::bytes();
  }

 private:
  enum class Found { form, formless, unusual };

  Found describe(PyObject* value, std::string& form) const {
    const PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (type != tensor_.ptr() && type != parameter_.ptr()) return Found::unusual;
    const auto is_neg =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, is_neg_.ptr()));
    if (!is_neg) throw py::error_already_set();
    if (is_neg.ptr() != Py_False) return Found::unusual;
    DlTensor tensor;
    if (exchange_->tensor(value, &tensor) != 0) {
      PyErr_Clear();
      return Found::formless;
    }
    put(form, 't');
    put(form, tensor.device);
    put(form, tensor.dtype);
    put(form, tensor.dims);
    std::int64_t size = 1;
    for (int i = 0; i < tensor.dims; ++i) {
      put(form, tensor.shape[i]);
      put(form, tensor.strides[i]);
      size *= tensor.shape[i];
    }
    return tensor.data == nullptr && size != 0 ? Found::formless : Found::form;
  }

  template <class T>
  static void put(std::string& form, const T& value) {
    form.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  const DlExchange* exchange_;
  py::object tensor_, parameter_, is_neg_;
};

}  // namespace dla
