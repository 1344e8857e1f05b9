#include "entries.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <utility>

#include "batch.h"

namespace py = pybind11;

namespace fastopt {
namespace {

constexpr size_t kBlock = 32;  // some 400 cache lines and small values: what the first two levels of cache hold
constexpr size_t kCacheLine = 64;

// Asks for the memory of an object.
void fetch(const void* object, size_t bytes) {
  for (size_t offset = 0; offset < bytes; offset += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(object) + offset);
  }
}

const c10::TensorImpl* impl_of(PyObject* tensor) {
  return THPVariable_Unpack(tensor).unsafeGetTensorImpl();
}

// Null for what is no tensor, or has none.
c10::StorageImpl* storage_of(PyObject* value) {
  const bool has_one = THPVariable_CheckExact(value) && impl_of(value)->has_storage();
  return has_one ? impl_of(value)->unsafe_storage().unsafeGetStorageImpl() : nullptr;
}

// Values that will be copied at once, as far as the size of the storage says; what is listed is read later.
void fetch_small_values(c10::StorageImpl& storage) {
  if (const auto bytes = storage.sym_nbytes().maybe_as_int(); bytes && *bytes < kSmallestListed) {
    fetch(storage._mutable_data_ptr_no_checks().get(), static_cast<size_t>(*bytes));
  }
}

// Calls `visit(key, value)` for the items of a dict up to a key that is no str. Whether there was none.
template <class Visit>
bool visit_items(PyObject* dict, Visit visit) {
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (!PyUnicode_CheckExact(key)) {
      return false;
    }
    visit(key, value);
  }
  return true;
}

}  // namespace

Item borrow(PyObject* key, PyObject* value) {
  const bool sole = Py_REFCNT(value) == 1;
  return {py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value), sole};
}

std::optional<std::vector<Item>> items_of(PyObject* dict) {
  std::vector<Item> items;
  if (!visit_items(dict, [&](PyObject* key, PyObject* value) { items.push_back(borrow(key, value)); })) {
    return std::nullopt;
  }
  return items;
}

EntryReader::EntryReader(const py::dict& saved_state, const py::dict& id_map)
    : saved_state_(saved_state), id_map_(id_map), size_(PyDict_GET_SIZE(saved_state.ptr())) {}

std::span<const Entry> EntryReader::next() {
  read_entries();
  find_params();
  gather_items();
  hold_items();
  return entries_;
}

void EntryReader::read_entries() {
  if (PyDict_GET_SIZE(saved_state_.ptr()) != size_) {
    throw std::runtime_error("dictionary changed size during iteration");
  }
  raw_.clear();
  std::pair<PyObject*, PyObject*> entry;
  while (raw_.size() < kBlock && PyDict_Next(saved_state_.ptr(), &position_, &entry.first, &entry.second)) {
    fetch(entry.first, sizeof(PyObject));
    fetch(entry.second, sizeof(PyDictObject));
    raw_.push_back(entry);
  }
  entries_.clear();
  for (const auto& [saved_id, value] : raw_) {
    entries_.push_back({borrow(saved_id, value), {}, PyDict_CheckExact(value), {}});
    if (entries_.back().is_dict) {
      fetch(reinterpret_cast<PyDictObject*>(value)->ma_keys, 2 * kCacheLine);
    }
  }
}

void EntryReader::find_params() {
  for (Entry& entry : entries_) {
    PyObject* param = PyDict_GetItemWithError(id_map_.ptr(), entry.item.key.ptr());
    if (param == nullptr && PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    __builtin_prefetch(param);
    entry.param = py::reinterpret_borrow<py::object>(param);
  }
}

// From here on no Python code runs until `next` returns, so that nothing needs to be held yet.
void EntryReader::gather_items() {
  raw_.clear();
  ranges_.clear();
  for (Entry& entry : entries_) {
    const size_t begin = raw_.size();
    entry.is_dict = entry.is_dict && visit_items(entry.item.value.ptr(), [&](PyObject* key, PyObject* value) {
                      fetch(value, sizeof(THPVariable));
                      raw_.emplace_back(key, value);
                    });
    if (!entry.is_dict) {
      raw_.resize(begin);
    }
    ranges_.push_back({begin, raw_.size()});
    if (entry.param && THPVariable_CheckExact(entry.param.ptr())) {
      fetch(impl_of(entry.param.ptr()), sizeof(c10::TensorImpl));
    }
  }
}

void EntryReader::hold_items() {
  items_.clear();
  for (const auto& [key, value] : raw_) {
    items_.push_back(borrow(key, value));
    if (THPVariable_CheckExact(value)) {
      fetch(impl_of(value), sizeof(c10::TensorImpl));
    }
  }
  for (const Item& item : items_) {
    if (const c10::StorageImpl* storage = storage_of(item.value.ptr())) {
      fetch(storage, sizeof(c10::StorageImpl));
    }
  }
  for (const Item& item : items_) {
    if (c10::StorageImpl* storage = storage_of(item.value.ptr())) {
      fetch_small_values(*storage);
    }
  }
  for (size_t i = 0; i < entries_.size(); ++i) {
    entries_[i].items = std::span(items_).subspan(ranges_[i].begin, ranges_[i].end - ranges_[i].begin);
  }
}

}  // namespace fastopt
