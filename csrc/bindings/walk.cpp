// The walk over the saved state: one pass that reads the dicts, allocates the results and lists the copies.
//
// The rules are those of `fastopt/state_dict.py`, for values that are plain (Note [Plain tensors]) in exact dicts keyed
// by str and in exact lists. Any other value is put off: its place is held by None, and the caller fills it by the
// Python rule after the copies have run, so that nothing in Python ever sees a tensor without its values.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string_view>
#include <utility>

#include "batch.h"
#include "bindings.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {
namespace {

constexpr size_t kMaxDepth = 64;

// Thrown where the walk as a whole is Python's: nesting without end, which it ends with a RecursionError; two entries
// for one place, of which the later must win although it may be ready earlier; a key that must itself be copied.
struct LeftToPython {};

// The collector would run over and over on tens of thousands of new containers of which none is garbage.
class PausedCollector {
 public:
  PausedCollector() : was_enabled_(PyGC_Disable() != 0) {}
  ~PausedCollector() {
    if (was_enabled_) {
      PyGC_Enable();
    }
  }
  PausedCollector(const PausedCollector&) = delete;
  PausedCollector& operator=(const PausedCollector&) = delete;

 private:
  bool was_enabled_;
};

bool is_step(PyObject* key) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_AsUTF8AndSize(key, &length);
  if (text == nullptr) {
    PyErr_Clear();  // lone surrogates: a str, and not "step"
    return false;
  }
  return std::string_view(text, static_cast<size_t>(length)) == "step";
}

bool is_atom(PyObject* value) {
  return value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value);
}

bool has_only_str_keys(PyObject* dict) {
  PyObject* key = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, nullptr)) {
    if (!PyUnicode_CheckExact(key)) {
      return false;
    }
  }
  return true;
}

void check(int status) {
  if (status != 0) {
    throw py::error_already_set();
  }
}

py::object checked(PyObject* object) {
  if (object == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(object);
}

// Calls `visit(key, value)` for every entry, both held meanwhile. Raises what Python raises when the dict changes size.
template <class Visit>
void for_each_entry(PyObject* dict, Visit visit) {
  const Py_ssize_t size = PyDict_GET_SIZE(dict);
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    const auto held_key = py::reinterpret_borrow<py::object>(key);
    const auto held_value = py::reinterpret_borrow<py::object>(value);
    visit(held_key, held_value);
    if (PyDict_GET_SIZE(dict) != size) {
      throw std::runtime_error("dictionary changed size during iteration");
    }
  }
}

class Walk {
 public:
  Walk(const py::object& hosted_on_device, const py::object& memo, const py::dict& state)
      : hosted_on_device_(hosted_on_device), memo_(memo), state_(state) {}

  // One entry of the saved state.
  void visit(const py::object& saved_id, const py::object& param, const py::object& value) {
    saved_id_ = saved_id;
    param_ = param;
    const auto& tensor = THPVariable_Unpack(param.ptr());
    to_floating_ = at::isFloatingType(tensor.scalar_type());
    param_dtype_ = tensor.scalar_type();
    const bool native = tensor.device().is_cpu();
    put_result(state_, param, value, native ? cast(value.ptr(), nullptr) : py::object());
  }

  // An entry for the Python rule as a whole. `param` is None where the id belongs to no parameter.
  void put_off(const py::object& saved_id, const py::object& param, const py::object& slot, const py::object& value) {
    saved_id_ = saved_id;
    param_ = param;
    put_result(state_, slot, value, py::object());
  }

  py::tuple finish() {
    batch_.run();
    py::list counts;
    for (const auto& [dtypes, tally] : tallies_) {
      counts.append(py::make_tuple(dtypes.first, dtypes.second, tally.tensors, tally.bytes_read, tally.bytes_written));
    }
    return py::make_tuple(deferred_, counts, copied_, shared_);
  }

 private:
  struct Tally {
    int64_t tensors = 0;
    int64_t bytes_read = 0;
    int64_t bytes_written = 0;
  };

  void count(const at::Tensor& from, const at::Tensor& to) {
    Tally& tally = tallies_[{from.scalar_type(), to.scalar_type()}];
    tally.tensors += 1;
    tally.bytes_read += static_cast<int64_t>(from.nbytes());
    tally.bytes_written += static_cast<int64_t>(to.nbytes());
  }

  // The value as the optimizer will hold it; null where the Python rule has to say.
  py::object cast(PyObject* value, PyObject* key) {
    if (is_atom(value)) {
      return py::reinterpret_borrow<py::object>(value);
    }
    if (Py_TYPE(value) == reinterpret_cast<PyTypeObject*>(THPVariableClass)) {
      return cast_tensor(value, key);
    }
    const bool dict = PyDict_CheckExact(value) && has_only_str_keys(value);
    if (!dict && !PyList_CheckExact(value)) {
      return {};
    }
    if (depth_ == kMaxDepth) {
      throw LeftToPython();
    }
    ++depth_;
    py::object result = dict ? cast_dict(value) : cast_list(value);
    --depth_;
    return result;
  }

  py::object cast_dict(PyObject* dict) {
    py::dict result;
    for_each_entry(dict, [&](const py::object& key, const py::object& value) {
      put_result(result, key, value, cast(value.ptr(), key.ptr()), key);
    });
    return result;
  }

  py::object cast_list(PyObject* list) {
    py::list result;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      const auto item = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list, i));
      py::object cast_item = cast(item.ptr(), nullptr);
      const bool deferred = !cast_item;
      result.append(deferred ? py::none() : cast_item);
      if (deferred) {
        defer(result, py::int_(i), item, py::none());
      }
    }
    return result;
  }

  py::object cast_tensor(PyObject* object, PyObject* key) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    at::ScalarType dtype = to_floating_ ? param_dtype_ : tensor.scalar_type();
    if (key != nullptr && is_step(key)) {
      const int hosted =
          hosted_on_device_.is_none() ? 0 : PySequence_Contains(hosted_on_device_.ptr(), saved_id_.ptr());
      if (hosted < 0) {
        throw py::error_already_set();
      }
      dtype = hosted ? at::kFloat : tensor.scalar_type();
    }
    // Outside of grad mode a tensor that requires grad is plain to a cast, but not to the deep copy that comes first.
    if (!is_plain(tensor) || (!memo_.is_none() && tensor.requires_grad())) {
      return {};
    }
    if (dtype != tensor.scalar_type()) {
      at::Tensor result = batch_.cast(tensor, dtype);
      if (!result.defined()) {
        return {};
      }
      count(tensor, result);
      return checked(THPVariable_Wrap(std::move(result)));
    }
    if (memo_.is_none()) {
      shared_ += 1;
      return py::reinterpret_borrow<py::object>(object);
    }
    return copy_tensor(object, tensor);
  }

  // A copy that a later `copy.deepcopy(object, memo)` will find.
  py::object copy_tensor(PyObject* object, const at::Tensor& tensor) {
    const py::object id = checked(PyLong_FromVoidPtr(object));
    if (PyObject* known = PyDict_GetItemWithError(memo_.ptr(), id.ptr())) {
      return py::reinterpret_borrow<py::object>(known);
    }
    check(PyErr_Occurred() != nullptr);
    if (!is_plainly_copied(object, tensor)) {
      return {};
    }
    at::Tensor result = batch_.clone(tensor);
    if (!result.defined()) {
      return {};
    }
    count(tensor, result);
    copied_ += 1;
    py::object wrapped = checked(THPVariable_Wrap(std::move(result)));
    check(PyDict_SetItem(memo_.ptr(), id.ptr(), wrapped.ptr()));
    return wrapped;
  }

  // Puts a result into its place, or None and a note of it where there is none yet. `key` is the value's own key for
  // the step rule, which the outermost value does not have.
  void put_result(const py::dict& container, const py::object& slot, const py::object& value, py::object result,
                  const py::object& key = py::none()) {
    const bool deferred = !result;
    const Py_ssize_t size = PyDict_GET_SIZE(container.ptr());
    check(PyDict_SetItem(container.ptr(), slot.ptr(), deferred ? Py_None : result.ptr()));
    if (PyDict_GET_SIZE(container.ptr()) == size) {
      throw LeftToPython();
    }
    if (deferred) {
      defer(container, slot, value, key);
    }
  }

  void defer(const py::object& container, const py::object& slot, const py::object& value, const py::object& key) {
    deferred_.append(py::make_tuple(container, slot, param_, value, saved_id_, key));
  }

  const py::object& hosted_on_device_;
  const py::object& memo_;
  const py::dict& state_;

  // The entry being walked.
  py::object saved_id_;
  py::object param_;
  at::ScalarType param_dtype_ = at::kFloat;
  bool to_floating_ = false;
  size_t depth_ = 0;  // of containers around the value being cast

  Batch batch_;
  py::list deferred_;
  std::map<std::pair<at::ScalarType, at::ScalarType>, Tally> tallies_;
  int64_t copied_ = 0;
  int64_t shared_ = 0;
};

}  // namespace

// saved_state: the saved dict's "state", an exact dict. id_map: saved id -> parameter. hosted_on_device: the saved ids
// whose step belongs on the parameter's device in float32, or None. memo: copy.deepcopy's memo for copy=True, or None.
// state: the new state, filled here.
// -> (deferred, counts, tensors copied, tensors shared), or None where the whole walk is Python's (LeftToPython).
//    deferred: (container, slot, parameter or None, value, saved id, key or None) for each value put off.
//    counts: (from dtype, to dtype, tensors, bytes read, bytes written), copies without a cast included.
py::object cast_state(const py::dict& saved_state, const py::dict& id_map, const py::object& hosted_on_device,
                      const py::object& memo, const py::dict& state) {
  Walk walk(hosted_on_device, memo, state);
  try {
    const PausedCollector paused;
    for_each_entry(saved_state.ptr(), [&](const py::object& saved_id, const py::object& value) {
      PyObject* found = PyDict_GetItemWithError(id_map.ptr(), saved_id.ptr());
      check(found == nullptr && PyErr_Occurred() != nullptr);
      if (found == nullptr) {
        if (!memo.is_none() && !is_atom(saved_id.ptr())) {
          throw LeftToPython();
        }
        walk.put_off(saved_id, py::none(), saved_id, value);
        return;
      }
      const auto param = py::reinterpret_borrow<py::object>(found);
      if (THPVariable_CheckExact(found)) {
        walk.visit(saved_id, param, value);
      } else {
        walk.put_off(saved_id, param, param, value);
      }
    });
  } catch (const LeftToPython&) {
    return py::none();
  }
  return walk.finish();
}

}  // namespace fastopt
