#include "torch_pickle.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "checked.h"
#include "jobs.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {
namespace {

constexpr size_t kMaxDepth = 64;
constexpr Py_ssize_t kBatch = 1000;  // entries that pickle adds to a container at once

constexpr const char* kRebuild = "torch._utils\n_rebuild_tensor_v2\n";
constexpr const char* kHooks = "collections\nOrderedDict\n";

// The name of the class that stands for a dtype in a pickle; null for younger dtypes, which torch pickles otherwise.
const char* storage_class(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return "torch\nDoubleStorage\n";
    case at::kFloat:
      return "torch\nFloatStorage\n";
    case at::kHalf:
      return "torch\nHalfStorage\n";
    case at::kBFloat16:
      return "torch\nBFloat16Storage\n";
    case at::kLong:
      return "torch\nLongStorage\n";
    case at::kInt:
      return "torch\nIntStorage\n";
    case at::kShort:
      return "torch\nShortStorage\n";
    case at::kChar:
      return "torch\nCharStorage\n";
    case at::kByte:
      return "torch\nByteStorage\n";
    case at::kBool:
      return "torch\nBoolStorage\n";
    case at::kComplexDouble:
      return "torch\nComplexDoubleStorage\n";
    case at::kComplexFloat:
      return "torch\nComplexFloatStorage\n";
    default:
      return nullptr;
  }
}

py::object interned(const char* word) {
  return checked(PyUnicode_InternFromString(word));
}

// Whether a pickle may come upon an object twice: not where its container has the only reference. The memo need not
// know such a one, and need not be asked for it, which would be a cache miss each.
bool stands_elsewhere(PyObject* object) {
  return Py_REFCNT(object) > 1;
}

bool has_hooks(PyObject* object) {
  PyObject* hooks = reinterpret_cast<THPVariable*>(object)->backward_hooks;
  return hooks != nullptr && hooks != Py_None;
}

}  // namespace

TorchPickle::TorchPickle(const py::dict& dtypes)
    : dtypes_(dtypes), casts_(!dtypes.empty()), word_storage_(interned("storage")), word_cpu_(interned("cpu")) {}

void TorchPickle::dump(py::handle content) {
  out_.append("\x80\x02");
  save(content.ptr(), 0);
  out_.push_back('.');
  check_views();
}

template <class Number>
void TorchPickle::put(Number number) {
  static_assert(std::endian::native == std::endian::little);
  out_.append(reinterpret_cast<const char*>(&number), sizeof number);
}

void TorchPickle::put_memo(uint32_t index) {
  if (index < 256) {
    out_.push_back('q');
    put(static_cast<uint8_t>(index));
  } else {
    out_.push_back('r');
    put(index);
  }
}

// For what is pickled once.
uint32_t TorchPickle::remember_new() {
  put_memo(next_);
  return next_++;
}

void TorchPickle::remember(const void* object) {
  memo_[object] = remember_new();
}

// Whether an object was pickled before: then the pickle refers to that.
bool TorchPickle::recall(const void* object) {
  const auto found = memo_.find(object);
  if (found == memo_.end()) {
    return false;
  }
  recall_index(found->second);
  return true;
}

void TorchPickle::recall_index(uint32_t index) {
  if (index < 256) {
    out_.push_back('h');
    put(static_cast<uint8_t>(index));
  } else {
    out_.push_back('j');
    put(index);
  }
}

void TorchPickle::save(PyObject* object, size_t depth) {
  if (save_atom(object) || (stands_elsewhere(object) && recall(object))) {
    return;
  }
  if (depth == kMaxDepth) {  // a container within itself, perhaps
    throw NotPlain();
  }
  if (Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(THPVariableClass)) {
    save_tensor(object);
  } else if (PyUnicode_CheckExact(object)) {
    save_string(object);
  } else if (PyDict_CheckExact(object)) {
    save_dict(object, depth);
  } else if (PyList_CheckExact(object)) {
    save_list(object, depth);
  } else if (PyTuple_CheckExact(object)) {
    save_tuple(object, depth);
  } else {
    throw NotPlain();
  }
}

// What pickle has no memo for.
bool TorchPickle::save_atom(PyObject* object) {
  if (object == Py_None) {
    out_.push_back('N');
  } else if (PyBool_Check(object)) {
    out_.push_back(object == Py_True ? '\x88' : '\x89');
  } else if (PyLong_CheckExact(object)) {
    save_int(object);
  } else if (PyFloat_CheckExact(object)) {
    out_.push_back('G');
    const auto bits = std::bit_cast<uint64_t>(PyFloat_AS_DOUBLE(object));
    for (int shift = 56; shift >= 0; shift -= 8) {
      put(static_cast<uint8_t>(bits >> shift));
    }
  } else {
    return false;
  }
  return true;
}

void TorchPickle::save_int(PyObject* object) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow != 0) {
    throw NotPlain();
  }
  save_int(number);
}

void TorchPickle::save_int(int64_t number) {
  if (number >= 0 && number < 256) {
    out_.push_back('K');
    put(static_cast<uint8_t>(number));
  } else if (number >= 0 && number < 65536) {
    out_.push_back('M');
    put(static_cast<uint16_t>(number));
  } else if (number == static_cast<int32_t>(number)) {
    out_.push_back('J');
    put(static_cast<int32_t>(number));
  } else {
    uint8_t length = 8;  // the fewest bytes that hold the number and its sign
    while (number == number << (8 * (9 - length)) >> (8 * (9 - length))) {
      --length;
    }
    out_.push_back('\x8a');
    put(length);
    out_.append(reinterpret_cast<const char*>(&number), length);
  }
}

void TorchPickle::save_string(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr || size > std::numeric_limits<int32_t>::max()) {
    PyErr_Clear();
    throw NotPlain();
  }
  out_.push_back('X');
  put(static_cast<uint32_t>(size));
  out_.append(text, static_cast<size_t>(size));
  remember(object);
}

void TorchPickle::save_dict(PyObject* object, size_t depth) {
  out_.push_back('}');
  remember(object);
  const Py_ssize_t size = PyDict_GET_SIZE(object);
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  for (Py_ssize_t done = 0; PyDict_Next(object, &position, &key, &value); ++done) {
    if (size > 1 && done % kBatch == 0) {
      out_.append(done == 0 ? "(" : "u(");
    }
    save(key, depth + 1);
    save(value, depth + 1);
  }
  if (size > 0) {
    out_.push_back(size == 1 ? 's' : 'u');
  }
}

void TorchPickle::save_list(PyObject* object, size_t depth) {
  out_.push_back(']');
  remember(object);
  const Py_ssize_t size = PyList_GET_SIZE(object);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (size > 1 && i % kBatch == 0) {
      out_.append(i == 0 ? "(" : "e(");
    }
    save(PyList_GET_ITEM(object, i), depth + 1);
  }
  if (size > 0) {
    out_.push_back(size == 1 ? 'a' : 'e');
  }
}

void TorchPickle::save_tuple(PyObject* object, size_t depth) {
  const Py_ssize_t size = PyTuple_GET_SIZE(object);
  if (size == 0) {
    out_.push_back(')');
    return;
  }
  if (size > 3) {
    out_.push_back('(');
  }
  for (Py_ssize_t i = 0; i < size; ++i) {
    save(PyTuple_GET_ITEM(object, i), depth + 1);
  }
  if (memo_.find(object) != memo_.end()) {  // within itself
    throw NotPlain();
  }
  out_.push_back(size > 3 ? 't' : static_cast<char>(0x84 + size));
  remember(object);
}

// A tuple that is made for the pickle.
void TorchPickle::save_ints(at::IntArrayRef numbers) {
  if (numbers.empty()) {
    out_.push_back(')');
    return;
  }
  if (numbers.size() > 3) {
    out_.push_back('(');
  }
  for (const int64_t number : numbers) {
    save_int(number);
  }
  out_.push_back(numbers.size() > 3 ? 't' : static_cast<char>(0x84 + numbers.size()));
  remember_new();
}

// `name` is one of the constants above, and known by its address.
void TorchPickle::save_global(const char* name) {
  if (!recall(name)) {
    out_.push_back('c');
    out_.append(name);
    remember(name);
  }
}

// As Tensor.__reduce_ex__ has it: _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks).
void TorchPickle::save_tensor(PyObject* object) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  const at::ScalarType dtype = dtype_of(object, tensor);
  if (!is_plain(tensor) || has_attributes(object) || has_hooks(object) || storage_class(dtype) == nullptr) {
    throw NotPlain();
  }
  const bool casts = dtype != tensor.scalar_type();
  if (casts && !is_dense(tensor)) {
    throw NotPlain();
  }
  size_t index = storages_.size();
  if (casts) {
    const auto size = static_cast<uint64_t>(tensor.numel()) * c10::elementSize(dtype);
    storages_.push_back({{}, tensor, dtype, size, {}});
  } else {
    index = storage_of(tensor);
  }
  save_global(kRebuild);
  out_.push_back('(');
  save_storage(index, dtype);
  save_int(casts ? 0 : tensor.storage_offset());
  save_ints(tensor.sizes());
  save_ints(tensor.strides());
  out_.push_back(tensor.requires_grad() ? '\x88' : '\x89');
  save_global(kHooks);
  out_.append(")R");
  remember_new();
  out_.push_back('t');
  remember_new();
  out_.push_back('R');
  if (stands_elsewhere(object)) {
    remember(object);
  } else {
    remember_new();
  }
}

// The persistent id of a storage: ("storage", class, key, location, number of elements).
void TorchPickle::save_storage(size_t index, at::ScalarType dtype) {
  out_.push_back('(');
  save(word_storage_.ptr(), 0);
  save_global(storage_class(dtype));
  save_name(index);
  save(word_cpu_.ptr(), 0);
  save_int(static_cast<int64_t>(storages_[index].size / c10::elementSize(dtype)));
  out_.push_back('t');
  remember_new();
  out_.push_back('Q');
}

// The name of a storage: its index, as a string that is nobody else's.
void TorchPickle::save_name(size_t index) {
  Stored& stored = storages_[index];
  if (stored.name) {
    recall_index(*stored.name);
    return;
  }
  const std::string name = std::to_string(index);
  out_.push_back('X');
  put(static_cast<uint32_t>(name.size()));
  out_.append(name);
  stored.name = remember_new();
}

// The index of a tensor's storage.
size_t TorchPickle::storage_of(const at::Tensor& tensor) {
  const c10::Storage& memory = tensor.storage();
  if (!is_the_only_user(memory)) {
    const auto [found, is_new] = shared_.emplace(memory.unsafeGetStorageImpl(), storages_.size());
    if (!is_new) {
      if (storages_[found->second].dtype != tensor.scalar_type()) {
        throw NotPlain();
      }
      return found->second;
    }
  }
  storages_.push_back({memory, {}, tensor.scalar_type(), memory.nbytes(), {}});
  return storages_.size() - 1;
}

// Memory that is viewed as two dtypes is torch's to refuse, also where two storages stand for it.
void TorchPickle::check_views() const {
  const auto differs = [&](const Stored& stored) { return stored.dtype != storages_.front().dtype; };
  if (std::none_of(storages_.begin(), storages_.end(), differs)) {
    return;
  }
  ska::flat_hash_map<const void*, at::ScalarType> viewed_as;
  for (const Stored& stored : storages_) {
    if (stored.memory && stored.memory.data() != nullptr &&
        viewed_as.emplace(stored.memory.data(), stored.dtype).first->second != stored.dtype) {
      throw NotPlain();
    }
  }
}

at::ScalarType TorchPickle::dtype_of(PyObject* object, const at::Tensor& tensor) const {
  if (casts_) {
    const py::object id = checked(PyLong_FromVoidPtr(object));
    if (PyObject* dtype = PyDict_GetItemWithError(dtypes_.ptr(), id.ptr())) {
      return py::handle(dtype).cast<at::ScalarType>();
    }
  }
  return tensor.scalar_type();
}

}  // namespace fastopt
