// Numbering parameters for a saved dict, and finding them again.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <unordered_map>

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

using Indices = std::unordered_map<PyObject*, Py_ssize_t>;

// A parameter that stands twice in one group gets the later index; over several groups the first wins.
py::list index_group(const py::object& params, Py_ssize_t start, Indices& indices) {
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(params.ptr());
  PyObject** items = PySequence_Fast_ITEMS(params.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    const auto [entry, added] = indices.try_emplace(items[i], start + i);
    if (!added && entry->second >= start) {
      entry->second = start + i;
    }
  }
  py::list packed(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    packed[static_cast<size_t>(i)] = py::int_(indices.at(items[i]));
  }
  return packed;
}

}  // namespace

// Numbers the parameters and keys the state by number, as `Optimizer.state_dict` does.
// -> (one list of indices a group, packed state)
py::tuple index_state(const py::list& param_lists, const py::dict& state) {
  Indices indices;
  py::list packed_lists;
  Py_ssize_t start = 0;
  for (const py::handle& params : param_lists) {
    py::list packed = index_group(as_sequence(params), start, indices);
    start += PyList_GET_SIZE(packed.ptr());
    packed_lists.append(std::move(packed));
  }
  py::dict packed_state;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    const auto held = py::reinterpret_borrow<py::object>(value);
    py::object packed_key = py::reinterpret_borrow<py::object>(key);
    if (THPVariable_Check(key)) {
      const auto found = indices.find(key);
      if (found == indices.end()) {
        PyErr_SetObject(PyExc_KeyError, py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(key)).ptr());
        throw py::error_already_set();
      }
      packed_key = py::int_(found->second);
    }
    if (PyDict_SetItem(packed_state.ptr(), packed_key.ptr(), held.ptr()) != 0) {
      throw py::error_already_set();
    }
  }
  return py::make_tuple(packed_lists, packed_state);
}

// Saved ids zipped with the parameters, over all groups in order; a saved id that stands twice: the last wins.
py::dict id_map(const py::list& saved_lists, const py::list& param_lists) {
  py::dict map;
  for (size_t group = 0; group < saved_lists.size(); ++group) {
    const py::object saved = as_sequence(saved_lists[group]);
    const py::object params = as_sequence(param_lists[group]);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(saved.ptr()); ++i) {
      const auto id = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(saved.ptr(), i));
      if (i >= PySequence_Fast_GET_SIZE(params.ptr())) {
        throw std::invalid_argument("id_map: group " + std::to_string(group) + " has more saved ids than parameters");
      }
      const auto param = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(params.ptr(), i));
      if (PyDict_SetItem(map.ptr(), id.ptr(), param.ptr()) != 0) {
        throw py::error_already_set();
      }
    }
  }
  return map;
}

}  // namespace fastopt
