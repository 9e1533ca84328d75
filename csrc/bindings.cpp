// The Python modules _dla_native (DLA_BACKEND=cpu) and _dla_native_cuda (DLA_BACKEND=cuda), which
// offer the same functions. Tensors are asked for their address in Python: no torch headers, so one
// build serves every torch. Callers are dla_kernels/ops/<op>/cpp.py.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/args.h"
#include "common/isa.h"
#include "forms.h"
#include "ops/base_attention/op.h"
#include "ops/cell/op.h"
#include "ops/gate/op.h"
#include "ops/global_pool/op.h"
#include "ops/light_attention/op.h"
#include "ops/residual_gate/op.h"
#include "ops/residual_norm/op.h"

namespace py = pybind11;

namespace dla {
namespace {

#ifdef DLA_CPU

Simd detect_simd() {
  Simd level = Simd::baseline;
#ifdef DLA_X86_ISAS
  // Every processor with AVX2 and FMA has F16C as well.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    level = Simd::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      level = Simd::avx512;
  }
#endif
  const char* cap = std::getenv("DLA_SIMD");
  if (cap == nullptr || *cap == '\0') return level;
  const std::string name = cap;
  if (name == "baseline") return Simd::baseline;
  if (name == "avx2") return std::min(level, Simd::avx2);
  if (name == "avx512") return level;
  throw std::invalid_argument("DLA_SIMD: expected baseline, avx2 or avx512, got '" + name + "'");
}

const char* simd_name(Simd level) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(level)];
}

#endif  // DLA_CPU

py::dict build_info() {
  py::dict info;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
#ifdef DLA_CPU
  py::list isas;
  isas.append("baseline");
#ifdef DLA_X86_ISAS
  isas.append("avx2");
  isas.append("avx512");
#endif
  info["isas"] = isas;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["without_cuda"] = DLA_WITHOUT_CUDA;  // why _dla_native_cuda was not built; "" if it was
#else
  info["targets"] = DLA_CUDA_TARGETS;
#endif
  return info;
}

// --- argument structs ----------------------------------------------------------------------------

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

// Python value -> field: an address, a number, an enum from its int, or a std::vector of these.
template <class T>
struct Field {
  static T from(py::handle value) {
    if constexpr (std::is_pointer_v<T>) {
      return address_of(value);
    } else if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(value.cast<std::underlying_type_t<T>>());
    } else {
      return value.cast<T>();
    }
  }
};

template <class T>
struct Field<std::vector<T>> {
  static std::vector<T> from(py::handle value) {
    std::vector<T> items;
    for (py::handle item : value) items.push_back(Field<T>::from(item));
    return items;
  }
};

// A field of a struct. Type-erased, as is all that follows: whatever is generated anew for each of
// three hundred fields, or each of a dozen structs, is slow to compile.
struct NamedField {
  const char* name;
  std::size_t offset;
  void (*assign)(void* field, py::handle value);
  PyObject* interned;  // the name, for the life of the process
};

template <class T>
void assign_field(void* field, py::handle value) {
  *static_cast<T*>(field) = Field<T>::from(value);
}

// Of the struct whose function is bound; set by then.
template <class Args>
std::vector<NamedField> fields_of;

template <std::size_t count>
std::vector<NamedField> interned(const NamedField (&named)[count]) {
  std::vector<NamedField> fields(named, named + count);
  for (NamedField& field : fields) field.interned = PyUnicode_InternFromString(field.name);
  return fields;
}

std::string text(py::handle name) { return name.cast<std::string>(); }

void assign(const NamedField& field, py::handle value, void* args) {
  try {
    field.assign(static_cast<char*>(args) + field.offset, value);
  } catch (const py::cast_error&) {
    throw py::type_error(std::string("argument ") + field.name + ": cannot use " +
                         text(py::repr(value)));
  }
}

void assign_all(const std::vector<NamedField>& fields, const py::kwargs& values, void* args) {
  for (const NamedField& field : fields) {
    PyObject* value = PyDict_GetItemWithError(values.ptr(), field.interned);
    if (value == nullptr) throw py::type_error(std::string("missing argument ") + field.name);
    assign(field, value, args);
  }
  if (values.size() != fields.size()) throw py::type_error("unknown argument given");
}

#ifdef DLA_CPU

// A function of a struct, with nothing left of its type.
struct StepFunction {
  const std::vector<NamedField>* fields;
  std::shared_ptr<void> (*make)();
  std::shared_ptr<void> (*copy)(const void* args);
  void (*call)(const void* args);
};

// A call that is made time and again. Some of its arguments stay; others are taken from a tuple that
// is given and from a list that is filled.
class Repeat {
 public:
  // constants: by name. given, made: pairs of a name and the place, or list of places, in these.
  Repeat(StepFunction function, const py::dict& constants, const py::list& given,
         const py::list& made)
      : function_(function),
        args_(function.make()),
        given_(sources(given)),
        made_(sources(made)) {
    for (const auto& [name, value] : constants) assign(find(name), value, args_.get());
    if (constants.size() + given.size() + made.size() != function.fields->size())
      throw py::type_error("missing argument");
  }

  void operator()(const py::tuple& given, const py::list& made) const {
    const std::shared_ptr<void> args = function_.copy(args_.get());  // for this call, on this thread
    take(given_, PySequence_Fast_ITEMS(given.ptr()), args.get());
    take(made_, PySequence_Fast_ITEMS(made.ptr()), args.get());
    const py::gil_scoped_release released;
    function_.call(args.get());
  }

 private:
  struct Source {
    NamedField field;
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

  NamedField find(py::handle name) const {
    PyObject* interned = name.inc_ref().ptr();
    PyUnicode_InternInPlace(&interned);
    const auto owner = py::reinterpret_steal<py::object>(interned);
    for (const NamedField& field : *function_.fields)
      if (field.interned == interned) return field;
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

  StepFunction function_;
  std::shared_ptr<void> args_;
  std::vector<Source> given_, made_;
};

void define_repeat(py::module_& m, const char* name, StepFunction function) {
  m.def(name, [=](const py::dict& constants, const py::list& given, const py::list& made) {
    return Repeat(function, constants, given, made);
  });
}

// Binds what makes a `Repeat` of a function that is bound already.
template <class Args, void (*function)(const Args&)>
void bind_repeat(py::module_& m, const char* name) {
  define_repeat(m, name,
                {&fields_of<Args>,
                 []() -> std::shared_ptr<void> { return std::make_shared<Args>(); },
                 [](const void* args) -> std::shared_ptr<void> {
                   return std::make_shared<Args>(*static_cast<const Args*>(args));
                 },
                 [](const void* args) { function(*static_cast<const Args*>(args)); }});
}

#endif  // DLA_CPU

using Function = std::function<std::int64_t(const py::kwargs&)>;

void define(py::module_& m, const char* name, Function function) { m.def(name, function); }

// Binds a function of a struct as one that wants every field by keyword. Returns 0 for void.
template <class Args, class Result>
void bind(py::module_& m, const char* name, Result (*function)(const Args&)) {
  define(m, name, [function](const py::kwargs& values) -> std::int64_t {
    Args args{};
    assign_all(fields_of<Args>, values, &args);
    const py::gil_scoped_release released;
    if constexpr (std::is_void_v<Result>)
      return function(args), 0;
    else
      return function(args);
  });
}

// DLA_BIND(m, function, Struct, field, field, ...): __VA_OPT__ recursion over the field names.
#define DLA_PARENS ()
#define DLA_REPEAT1(...) DLA_REPEAT2(DLA_REPEAT2(DLA_REPEAT2(DLA_REPEAT2(__VA_ARGS__))))
#define DLA_REPEAT2(...) DLA_REPEAT3(DLA_REPEAT3(DLA_REPEAT3(DLA_REPEAT3(__VA_ARGS__))))
#define DLA_REPEAT3(...) DLA_REPEAT4(DLA_REPEAT4(DLA_REPEAT4(DLA_REPEAT4(__VA_ARGS__))))
#define DLA_REPEAT4(...) __VA_ARGS__
#define DLA_FIELD(Struct, field, ...)                                                        \
  {#field, offsetof(Struct, field), &assign_field<decltype(Struct::field)>, nullptr}         \
  __VA_OPT__(, DLA_FIELD_AGAIN DLA_PARENS(Struct, __VA_ARGS__))
#define DLA_FIELD_AGAIN() DLA_FIELD
#define DLA_BIND(m, function, Struct, ...)                                                   \
  {                                                                                          \
    static constexpr NamedField fields[] = {DLA_REPEAT1(DLA_FIELD(Struct, __VA_ARGS__))};    \
    fields_of<Struct> = interned(fields);                                                    \
    bind(m, #function, &DLA_BACKEND::function);                                              \
  }

}  // namespace

#ifdef DLA_CPU
Simd simd_level() {
  static const Simd level = detect_simd();
  return level;
}
#endif

PYBIND11_MODULE(DLA_MODULE, m) {
  m.doc() = "Native kernels of dla-kernels; call them through dla_kernels.ops.";
  m.def("build_info", &build_info);

  DLA_BIND(m, global_pool_forward, GlobalPoolForward, x, out, batch, channels, area, dtype,
           channels_last, threads, stream);
  DLA_BIND(m, global_pool_backward, GlobalPoolBackward, grad, dx, batch, channels, area, dtype,
           channels_last, threads, stream);

  DLA_BIND(m, gate_forward, GateForward, x, gates, out, batch, channels, area, channels_last, dtype,
           threads, stream);
  DLA_BIND(m, gate_backward, GateBackward, grad, x, gates, dx, dgates, batch, channels, area,
           channels_last, dtype, threads, stream);

  DLA_BIND(m, residual_gate_forward, ResidualGateForward, u, h, shortcut, out, batch, channels, area,
           channels_last, dtype, threads, stream);
  DLA_BIND(m, residual_gate_backward, ResidualGateBackward, grad, u, h, out, du, dh, dshortcut,
           batch, channels, area, channels_last, dtype, threads, stream);

  DLA_BIND(m, cell_forward, CellForward, y, state, params, out, batch, channels, hidden, kind,
           activation, dtype, threads, stream);
  DLA_BIND(m, cell_backward, CellBackward, grad_out, y, state, params, grad_y, grad_state,
           grad_params, scratch, batch, channels, hidden, kind, activation, dtype, threads, stream);

  DLA_BIND(m, residual_norm_forward, ResidualNormForward, x, weight, bias, batch, channels, height,
           width, channels_last, dtype, norm, eps, threads, stream, scratch, pieces, shortcut,
           mean_in, var_in, out, mean, var);
  DLA_BIND(m, residual_norm_backward, ResidualNormBackward, x, weight, bias, batch, channels, height,
           width, channels_last, dtype, norm, eps, threads, stream, scratch, pieces, grad, out, mean,
           var, dx, dshortcut, dweight, dbias);

  DLA_BIND(m, light_attention_forward, LightAttentionForward, x, p, state, cell_params, q_weight,
           k_weight, v_weight, prev_weight, lam, norm_weight, norm_bias, branch_weight, branch_bias,
           drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden, dtype, cell,
           activation, norm, branch_norm, channels_last, sigmoid_gate, first_sample, residual, join,
           eps, branch_eps, threads, stream, scratch, mean_in, var_in, branch_mean_in,
           branch_var_in, out, o, new_state, mean, var, branch_mean, branch_var, summary);

  DLA_BIND(m, light_attention_backward, LightAttentionBackward, x, p, state, cell_params, q_weight,
           k_weight, v_weight, prev_weight, lam, norm_weight, norm_bias, branch_weight, branch_bias,
           drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden, dtype, cell,
           activation, norm, branch_norm, channels_last, sigmoid_gate, first_sample, residual, join,
           eps, branch_eps, threads, stream, scratch, grad_out, grad_o, grad_state, mean,
           var, branch_mean, branch_var, new_state, summary, dx, dp, dstate, dq_weight, dk_weight,
           dv_weight, dprev_weight, dlam, dnorm_weight, dnorm_bias, dbranch_weight, dbranch_bias,
           dcell_params);

  DLA_BIND(m, base_attention_forward, BaseAttentionForward, x, values, state, keys, gates, pooled,
           cell_params, q_weight, k_weight, key_weights, v_weight, norm_weight, norm_bias,
           drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden, dtype, cell,
           activation, norm, channels_last, sigmoid_gate, first_sample, relu, residual,
           gated_features, eps, threads, stream, scratch, mean_in, var_in, out, v, state_out,
           keys_out, gates_out, pooled_v, scores, mean, var, pooled_x);
  DLA_BIND(m, base_attention_backward, BaseAttentionBackward, x, values, state, keys, gates,
           pooled, cell_params, q_weight, k_weight, key_weights, v_weight, norm_weight, norm_bias,
           drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden, dtype, cell,
           activation, norm, channels_last, sigmoid_gate, first_sample, relu, residual,
           gated_features, eps, threads, stream, scratch, grad_out, grad_v, grad_state, grad_keys,
           grad_gates, grad_pooled_v, grad_pooled_x, later_grads, later_weights, mean, var, scores,
           pooled_x, dx, g, weights, dv, dstate, dkeys, dgates, dpooled, dcell_params, dq_weight,
           dk_weight, dkey_weights, dv_weight, dnorm_weight, dnorm_bias);

#ifdef DLA_CPU
  py::class_<Forms>(m, "Forms", py::module_local())
      .def(py::init<py::capsule, py::object, py::object>())
      .def("__call__", &Forms::operator());
  py::class_<Repeat>(m, "Repeat", py::module_local()).def("__call__", &Repeat::operator());
  bind_repeat<LightAttentionForward, &cpu::light_attention_forward>(
      m, "repeat_light_attention_forward");
  bind_repeat<LightAttentionBackward, &cpu::light_attention_backward>(
      m, "repeat_light_attention_backward");
  bind_repeat<BaseAttentionForward, &cpu::base_attention_forward>(
      m, "repeat_base_attention_forward");
  bind_repeat<BaseAttentionBackward, &cpu::base_attention_backward>(
      m, "repeat_base_attention_backward");
  m.def("simd_level", [] { return simd_name(simd_level()); });
#else
  bind(m, "light_attention_forward_scratch", &cuda::light_attention_forward_scratch);
  bind(m, "light_attention_backward_scratch", &cuda::light_attention_backward_scratch);
  bind(m, "base_attention_forward_scratch", &cuda::base_attention_forward_scratch);
  bind(m, "base_attention_backward_scratch", &cuda::base_attention_backward_scratch);
#endif
}

}  // namespace dla
