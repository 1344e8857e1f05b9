// Numbering parameters for a saved dict, and finding them again.
#include <c10/util/flat_hash_map.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace fastopt {
namespace {

py::object as_sequence(py::handle object) {
  PyObject* fast = PySequence_Fast(object.ptr(), "a param group's params are not iterable");
  if (fast == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(fast);
}

// Whether the state begins with every parameter, in the order of the groups, as it does after a step or a load. A
// dict's keys are unique, so no parameter stands twice then, and its number is its position: nothing has to be looked
// up.
bool stands_in_order(const std::vector<py::object>& groups, const py::dict& state) {
  PyObject* key = nullptr;
  Py_ssize_t position = 0;
  for (const py::object& params : groups) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i) {
      if (!PyDict_Next(state.ptr(), &position, &key, nullptr) || key != PySequence_Fast_GET_ITEM(params.ptr(), i)) {
        return false;
      }
    }
  }
  return true;
}

// Parameters by number: the int objects that stand in the packed lists, and which of them is whose.
class Numbering {
 public:
  // A parameter that stands twice in one group gets the later index; over several groups the first wins.
  py::list add_group(const py::object& params) {
    const size_t start = ints_.size();
    const py::list packed = add_distinct_group(params);
    PyObject** items = PySequence_Fast_ITEMS(params.ptr());
    for (size_t i = 0; i < packed.size(); ++i) {
      const auto [entry, added] = index_of_.emplace(items[i], start + i);
      if (!added && entry->second >= start) {
        entry->second = start + i;
      }
    }
    for (size_t i = 0; i < packed.size(); ++i) {
      packed[i] = find(items[i]);
    }
    return packed;
  }

  // A group of parameters that stand nowhere else; `find` does not know them, and `at` does.
  py::list add_distinct_group(const py::object& params) {
    const auto size = static_cast<size_t>(PySequence_Fast_GET_SIZE(params.ptr()));
    py::list packed(size);
    for (size_t i = 0; i < size; ++i) {
      ints_.push_back(py::int_(ints_.size()));
      PyList_SET_ITEM(packed.ptr(), static_cast<Py_ssize_t>(i), ints_.back().inc_ref().ptr());
    }
    return packed;
  }

  // The index of a parameter as an int object; null for a key that stands in no group.
  py::handle find(PyObject* param) const {
    const auto found = index_of_.find(param);
    return found == index_of_.end() ? py::handle() : at(found->second);
  }

  py::handle at(size_t index) const { return ints_[index]; }

  size_t size() const { return ints_.size(); }

 private:
  ska::flat_hash_map<PyObject*, size_t> index_of_;
  std::vector<py::object> ints_;
};

// An empty dict with room for so many items: growing one to 100,000 took a seventh of the time of `index_state`.
py::dict dict_for(Py_ssize_t size) {
  PyObject* made = _PyDict_NewPresized(size);
  if (made == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::dict>(made);
}

void set_item(const py::dict& dict, py::handle key, py::handle value) {
  if (PyDict_SetItem(dict.ptr(), key.ptr(), value.ptr()) != 0) {
    throw py::error_already_set();
  }
}

// The key itself, of a state that belongs to no parameter. A tensor is none: torch raises KeyError with its id.
py::object own_key(py::object key) {
  if (THPVariable_Check(key.ptr())) {
    PyErr_SetObject(PyExc_KeyError, py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(key.ptr())).ptr());
    throw py::error_already_set();
  }
  return key;
}

}  // namespace

// Numbers the parameters and keys the state by number, as `Optimizer.state_dict` does.
// -> (one list of indices a group, packed state)
py::tuple index_state(const py::list& param_lists, const py::dict& state) {
  std::vector<py::object> groups;
  for (const py::handle& params : param_lists) {
    groups.push_back(as_sequence(params));
  }
  const bool in_order = stands_in_order(groups, state);
  Numbering numbering;
  py::list packed_lists;
  for (const py::object& params : groups) {
    packed_lists.append(in_order ? numbering.add_distinct_group(params) : numbering.add_group(params));
  }
  const py::dict packed_state = dict_for(PyDict_GET_SIZE(state.ptr()));
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  for (size_t entry = 0; PyDict_Next(state.ptr(), &position, &key, &value); ++entry) {
    // The address alone tells a parameter: with 100,000 of them, looking at each would be a cache miss each.
    const py::handle index = in_order && entry < numbering.size() ? numbering.at(entry) : numbering.find(key);
    if (index) {
      set_item(packed_state, index, value);
    } else {
      const auto held = py::reinterpret_borrow<py::object>(value);
      set_item(packed_state, own_key(py::reinterpret_borrow<py::object>(key)), held);
    }
  }
  return py::make_tuple(packed_lists, packed_state);
}

// Saved ids zipped with the parameters, over all groups in order; a saved id that stands twice: the last wins.
py::dict id_map(const py::list& saved_lists, const py::list& param_lists) {
  Py_ssize_t ids = 0;
  for (const py::handle& saved : saved_lists) {
    ids += static_cast<Py_ssize_t>(py::len(saved));
  }
  const py::dict map = dict_for(ids);
  for (size_t group = 0; group < saved_lists.size(); ++group) {
    const py::object saved = as_sequence(saved_lists[group]);
    const py::object params = as_sequence(param_lists[group]);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(saved.ptr()); ++i) {
      const auto id = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(saved.ptr(), i));
      if (i >= PySequence_Fast_GET_SIZE(params.ptr())) {
        throw std::invalid_argument("id_map: group " + std::to_string(group) + " has more saved ids than parameters");
      }
      const auto param = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(params.ptr(), i));
      set_item(map, id, param);
    }
  }
  return map;
}

}  // namespace fastopt
