// The walk over the saved state: one pass that reads the dicts, allocates the results and makes or lists the copies.
//
// The rules are those of `fastopt/state_dict.py`, for values that are plain (Note [Plain tensors]) in exact dicts keyed
// by str and in exact lists. Any other value is put off: its place is held by None, and the caller fills it by the
// Python rule after the copies have run, so that nothing in Python ever sees a tensor without its values.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"
#include "bindings.h"
#include "checked.h"
#include "device.h"
#include "dtensors.h"
#include "entries.h"
#include "plain.h"
#include "rules.h"

namespace py = pybind11;

namespace fastopt {
namespace {

constexpr size_t kMaxDepth = 64;

// Thrown where the walk as a whole is Python's: nesting without end, which it ends with a RecursionError; two entries
// for one place, of which the later must win although it may be ready earlier; a key that must itself be copied.
struct LeftToPython {};

bool is_step(PyObject* key) {
  return PyUnicode_GET_LENGTH(key) == 4 && PyUnicode_CompareWithASCIIString(key, "step") == 0;
}

// For state keys, which are str or None.
bool is_same_key(PyObject* a, PyObject* b) {
  return a == b || (a != Py_None && b != Py_None && PyUnicode_Compare(a, b) == 0);
}

bool is_atom(PyObject* value) {
  return value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value);
}

// A parameter in a saved state is cast as any tensor, but its deep copy is a parameter: Python's.
bool is_tensor_and_no_parameter(PyObject* object) {
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(THPVariableClass);
}

class Walk {
 public:
  Walk(const py::object& hosted_on_device, const py::object& rule_of, const py::object& memo, const py::dict& state,
       bool audits, bool gives, bool reads_files, const py::object& dtensors)
      : hosted_on_device_(hosted_on_device),
        memo_(memo),
        state_(state),
        audits_(audits),
        gives_(gives),
        rules_(rule_of),
        dtensors_(dtensors),
        batch_(reads_files),
        device_batch_(reads_files) {}

  void visit(const Entry& entry) {
    saved_id_ = entry.item.key;
    if (!entry.param) {
      if (!memo_.is_none() && !is_atom(saved_id_.ptr())) {
        throw LeftToPython();
      }
      param_ = py::none();
      put_entry(saved_id_, entry.item.value, {});
      return;
    }
    param_ = entry.param;
    py::object result;
    if (THPVariable_CheckExact(param_.ptr()) || dtensors_.is_one(param_)) {
      const at::Tensor& tensor = THPVariable_Unpack(param_.ptr());
      target_ = {tensor.scalar_type(), tensor.device(), is_hosted_on_device(saved_id_)};
      const bool is_reached = target_.device.is_cpu() || (target_.device.is_cuda() && DeviceBatch::is_built());
      if (is_reached || !rules_.are_reference()) {
        // A state that is no dict has no key: its saved id is none, and may be of any type.
        result = entry.is_dict ? cast_dict(entry.items, entry.item.sole)
                               : cast({{}, entry.item.value, entry.item.sole}, /*sole=*/true);
      }
    }
    put_entry(param_, entry.item.value, std::move(result));
  }

  py::tuple finish() {
    device_batch_.run([this](size_t copy) { return described(places_[copy]); });
    batch_.run();
    py::list counts;
    for (const auto& [dtypes, tally] : tallies_) {
      counts.append(py::make_tuple(dtypes.first, dtypes.second, tally.tensors, tally.bytes_read, tally.bytes_written));
    }
    py::list audits;
    for (const Audited& row : audited_) {
      if (row.tensors == 0) {  // all of them put off
        continue;
      }
      const Audit& audit = row.audit;
      audits.append(py::make_tuple(row.key, row.dtypes.first, row.dtypes.second, audit.values, audit.overflowed,
                                   audit.underflowed, audit.subnormal, audit.nan, audit.inf, audit.largest_error));
    }
    return py::make_tuple(deferred_, counts, copied_, shared_, audits);
  }

 private:
  using DTypes = std::pair<at::ScalarType, at::ScalarType>;

  struct Tally {
    int64_t tensors = 0;
    int64_t bytes_read = 0;
    int64_t bytes_written = 0;
  };

  struct Audited {
    py::object key;  // the state key; None for a state that is no dict
    DTypes dtypes;
    int64_t tensors;
    Audit audit;
  };

  struct Place {
    py::object saved_id;
    py::object key;  // null for an item of a list
  };

  static std::string described(const Place& place) {
    const std::string entry = "the state saved under id " + std::string(py::repr(place.saved_id));
    return entry + (place.key ? ", at key " + std::string(py::repr(place.key)) : ", at a value without a key");
  }

  // Where a cast of the current state key is counted.
  Audited* audited(DTypes dtypes) {
    for (Audited& row : audited_) {
      if (row.dtypes == dtypes && is_same_key(row.key.ptr(), state_key_.ptr())) {
        return &row;
      }
    }
    return &audited_.emplace_back(Audited{state_key_, dtypes, 0, {}});
  }

  void count(const at::Tensor& from, const at::Tensor& to) {
    const DTypes dtypes{from.scalar_type(), to.scalar_type()};
    if (tally_ == nullptr || dtypes != tally_->first) {
      tally_ = &*tallies_.try_emplace(dtypes).first;
    }
    tally_->second.tensors += 1;
    tally_->second.bytes_read += static_cast<int64_t>(from.nbytes());
    tally_->second.bytes_written += static_cast<int64_t>(to.nbytes());
  }

  bool is_hosted_on_device(const py::object& saved_id) const {
    const int hosted = hosted_on_device_.is_none() ? 0 : PySequence_Contains(hosted_on_device_.ptr(), saved_id.ptr());
    check(hosted < 0);
    return hosted != 0;
  }

  // The value as the optimizer will hold it; null where the Python rule has to say. `sole`: whether all containers
  // around the value, and the value itself, are referred to from nowhere else.
  py::object cast(const Item& item, bool sole) {
    PyObject* value = item.value.ptr();
    sole = sole && item.sole;
    if (is_atom(value)) {
      return item.value;
    }
    if (is_tensor_and_no_parameter(value)) {
      return cast_tensor(item, sole);
    }
    if (dtensors_.is_one(item.value)) {
      return cast_dtensor(item, sole);
    }
    if (depth_ == kMaxDepth) {
      throw LeftToPython();
    }
    ++depth_;
    py::object result;
    if (PyDict_CheckExact(value)) {
      if (const auto items = items_of(value)) {
        result = cast_dict(*items, sole);
      }
    } else if (PyList_CheckExact(value)) {
      result = cast_list(value, sole);
    }
    --depth_;
    return result;
  }

  py::object cast_dict(std::span<const Item> items, bool sole) {
    py::dict result;
    const bool is_state = state_key_.is_none();
    for (const Item& item : items) {
      if (is_state) {
        state_key_ = item.key;
      }
      py::object cast_item = cast(item, sole);
      check(PyDict_SetItem(result.ptr(), item.key.ptr(), cast_item ? cast_item.ptr() : Py_None));
      if (!cast_item) {
        defer(result, item.key, item.value, item.key);
      }
    }
    if (is_state) {
      state_key_ = py::none();
    }
    return result;
  }

  py::object cast_list(PyObject* list, bool sole) {
    py::list result;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      const Item item = borrow(nullptr, PyList_GET_ITEM(list, i));
      py::object cast_item = cast(item, sole);
      check(PyList_Append(result.ptr(), cast_item ? cast_item.ptr() : Py_None));
      if (!cast_item) {
        defer(result, py::int_(i), item.value, py::none());
      }
    }
    return result;
  }

  py::object cast_tensor(const Item& item, bool sole) {
    const at::Tensor& tensor = THPVariable_Unpack(item.value.ptr());
    const Rule& rule = rules_.at(state_key_, item.key && is_step(item.key.ptr()));
    const bool on_cpu = is_plain(tensor);
    // Outside of grad mode a tensor that requires grad is plain to a cast, but not to the deep copy that comes first.
    if (!(on_cpu || is_plain_cuda(tensor)) || (!memo_.is_none() && tensor.requires_grad())) {
      return {};
    }
    const at::ScalarType dtype = rule.dtype(tensor.scalar_type(), target_);
    const c10::Device device = rule.device(tensor.device(), target_);
    if (dtype != tensor.scalar_type() || device != tensor.device()) {
      return cast_to(item, dtype, device, on_cpu && device == tensor.device(), sole);
    }
    if (memo_.is_none()) {
      shared_ += 1;
      return item.value;
    }
    return copy_tensor(item, sole);
  }

  // The part of it that is here, as a tensor of its own (Note [DTensors]). What has more to it is Python's.
  py::object cast_dtensor(const Item& item, bool sole) {
    const at::Tensor& whole = THPVariable_Unpack(item.value.ptr());
    const Rule& rule = rules_.at(state_key_, item.key && is_step(item.key.ptr()));
    const at::ScalarType dtype = rule.dtype(whole.scalar_type(), target_);
    const py::object part = dtensors_.part(item.value);
    if (!part || whole.requires_grad() || !is_dense(whole) || rule.device(whole.device(), target_) != whole.device()) {
      return {};
    }
    const at::Tensor& tensor = THPVariable_Unpack(part.ptr());
    if (!(is_plain(tensor) || is_plain_cuda(tensor)) || tensor.scalar_type() != whole.scalar_type()) {
      return {};
    }
    if (dtype == whole.scalar_type() && memo_.is_none()) {
      shared_ += 1;
      return item.value;
    }
    const bool is_copy = dtype == whole.scalar_type();
    if (is_copy && (whole.grad().defined() || has_attributes(item.value.ptr()))) {
      return {};  // a deep copy of more than its elements
    }
    if (py::object known = is_copy ? remembered(item.value, sole) : py::object()) {
      return known;
    }
    const Item in_part{item.key, part, /*sole=*/false};
    py::object result = cast_to(in_part, dtype, tensor.device(), tensor.is_cpu(), /*sole=*/false);
    if (!result) {
      return {};
    }
    result = dtensors_.around(result, item.value);
    if (is_copy) {
      copied_ += 1;
      remember(item.value, sole, result);
    }
    return result;
  }

  py::object cast_to(const Item& item, at::ScalarType dtype, c10::Device device, bool within_cpu, bool sole) {
    const at::Tensor& tensor = THPVariable_Unpack(item.value.ptr());
    Audited* const row = audits_ && dtype != tensor.scalar_type() ? audited({tensor.scalar_type(), dtype}) : nullptr;
    Audit* const audit = row == nullptr ? nullptr : &row->audit;
    py::object result = within_cpu ? batch_.cast(item.value, dtype, audit, gives_ && sole)
                                   : cast_on_device(item, dtype, device, audit, gives_ && sole);
    if (!result) {
      return {};
    }
    count(tensor, THPVariable_Unpack(result.ptr()));
    if (row != nullptr) {
      row->tensors += 1;
    }
    return result;
  }

  py::object cast_on_device(const Item& item, at::ScalarType dtype, c10::Device device, Audit* audit, bool is_given) {
    py::object result = device_batch_.cast(item.value, dtype, device, audit, is_given);
    places_.resize(device_batch_.size(), {saved_id_, item.key});
    return result;
  }

  // The copy that was made of an object before, if any. Where this is the only reference to it, none was.
  py::object remembered(const py::object& object, bool sole) {
    if (sole) {
      return {};
    }
    PyObject* known = PyDict_GetItemWithError(memo_.ptr(), checked(PyLong_FromVoidPtr(object.ptr())).ptr());
    check(known == nullptr && PyErr_Occurred() != nullptr);
    return py::reinterpret_borrow<py::object>(known);
  }

  // Has a later `copy.deepcopy(object, memo)` find the copy; where this is the only reference, none can come.
  void remember(const py::object& object, bool sole, const py::object& copy) {
    if (!sole) {
      check(PyDict_SetItem(memo_.ptr(), checked(PyLong_FromVoidPtr(object.ptr())).ptr(), copy.ptr()));
    }
  }

  py::object copy_tensor(const Item& item, bool sole) {
    const py::object& object = item.value;
    if (py::object known = remembered(object, sole)) {
      return known;
    }
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    if (!has_only_its_storage(object.ptr(), tensor)) {
      return {};
    }
    py::object result;
    if (tensor.is_cpu()) {
      result = batch_.clone(object);
    } else if (fills_its_storage(tensor)) {
      result = cast_on_device(item, tensor.scalar_type(), tensor.device(), nullptr, /*is_given=*/false);
    }
    if (!result) {
      return {};
    }
    count(tensor, THPVariable_Unpack(result.ptr()));
    copied_ += 1;
    remember(object, sole, result);
    return result;
  }

  // Puts an entry into the new state, or None and a note of it where there is nothing to put yet.
  void put_entry(const py::object& slot, const py::object& value, py::object result) {
    const Py_ssize_t size = PyDict_GET_SIZE(state_.ptr());
    check(PyDict_SetItem(state_.ptr(), slot.ptr(), result ? result.ptr() : Py_None));
    if (PyDict_GET_SIZE(state_.ptr()) == size) {
      throw LeftToPython();
    }
    if (!result) {
      defer(state_, slot, value, py::none());
    }
  }

  // `key` is the value's own key for the step rule, which an item of a list and an entry as a whole do not have. An
  // entry as a whole has no state key either.
  void defer(const py::object& container, const py::object& slot, const py::object& value, const py::object& key) {
    deferred_.append(py::make_tuple(container, slot, param_, value, saved_id_, key, state_key_));
  }

  const py::object& hosted_on_device_;
  const py::object& memo_;
  const py::dict& state_;
  const bool audits_;
  const bool gives_;

  // The entry being walked.
  py::object saved_id_;
  py::object param_;
  Target target_;
  py::object state_key_ = py::none();  // of what stands in the parameter's state, at any depth
  size_t depth_ = 0;                   // of containers around the value being cast

  std::deque<Audited> audited_;  // the batches point into it: before them, and growing without moving
  Rules rules_;
  DTensors dtensors_;
  Batch batch_;
  DeviceBatch device_batch_;
  std::vector<Place> places_;  // of what the device batch lists
  py::list deferred_;
  std::map<DTypes, Tally> tallies_;
  std::pair<const DTypes, Tally>* tally_ = nullptr;  // the last one used
  int64_t copied_ = 0;
  int64_t shared_ = 0;
};

}  // namespace

// saved_state: the saved dict's "state", an exact dict. id_map: saved id -> parameter. hosted_on_device: the saved ids
// whose step belongs on the parameter's device in float32, or None. rule_of: as in rules.h. memo:
// copy.deepcopy's memo for copy=True, or None. state: the new state, filled here.
// audits: whether casts are counted. gives: whether what nobody else refers to may be lost when it has been cast.
// reads_files: whether what lies in a mapped file still holds what the file does, and is read from there.
// dtensors: as in dtensors.h.
// -> (deferred, counts, tensors copied, tensors shared, audits), or None where the whole walk is Python's
// (LeftToPython).
//    deferred: (container, slot, parameter or None, value, saved id, key or None, state key or None) for each value put
//    off.
//    counts: (from dtype, to dtype, tensors, bytes read, bytes written), copies without a cast included.
//    audits: (state key, from dtype, to dtype, and the members of Audit).
py::object cast_state(const py::dict& saved_state, const py::dict& id_map, const py::object& hosted_on_device,
                      const py::object& rule_of, const py::object& memo, const py::dict& state, bool audits, bool gives,
                      bool reads_files, const py::object& dtensors) {
  Walk walk(hosted_on_device, rule_of, memo, state, audits, gives, reads_files, dtensors);
  try {
    EntryReader reader(saved_state, id_map);
    for (auto entries = reader.next(); !entries.empty(); entries = reader.next()) {
      for (const Entry& entry : entries) {
        walk.visit(entry);
      }
    }
  } catch (const LeftToPython&) {
    return py::none();
  }
  return walk.finish();
}

}  // namespace fastopt
