#include "plain_pickle.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checked.h"
#include "memory.h"
#include "new_tensor.h"

namespace py = pybind11;

namespace fastopt {
namespace {

enum Op : unsigned char {
  kMark = '(',
  kStop = '.',
  kBinFloat = 'G',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kNone = 'N',
  kBinPersId = 'Q',
  kReduce = 'R',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobal = 'c',
  kAppends = 'e',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTuple = 't',
  kSetItems = 'u',
  kEmptyTuple = ')',
  kEmptyList = ']',
  kEmptyDict = '}',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
};

void require(bool plain) {
  if (!plain) {
    throw NotPlain();
  }
}

// Reads on, and never beyond the end.
class Cursor {
 public:
  explicit Cursor(std::string_view bytes) : rest_(bytes) {}

  std::string_view take(size_t bytes) {
    require(bytes <= rest_.size());
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return taken;
  }

  unsigned char byte() { return static_cast<unsigned char>(take(1).front()); }

  unsigned char peek() const {
    require(!rest_.empty());
    return static_cast<unsigned char>(rest_.front());
  }

  // Up to the end of the line, which goes as well.
  std::string_view line() {
    const size_t length = rest_.find('\n');
    require(length != std::string_view::npos);
    return take(length + 1).substr(0, length);
  }

  template <class Number>
  Number number() {  // little-endian, as this machine is
    Number result;
    std::memcpy(&result, take(sizeof(Number)).data(), sizeof(Number));
    return result;
  }

  double big_endian_double() {
    std::array<char, sizeof(double)> bytes;
    const std::string_view taken = take(sizeof(double));
    std::copy(taken.rbegin(), taken.rend(), bytes.begin());
    return std::bit_cast<double>(bytes);
  }

  int64_t long1() {
    const size_t length = byte();
    require(length <= sizeof(int64_t));
    const std::string_view bytes = take(length);
    int64_t result = length > 0 && (bytes.back() & 0x80) != 0 ? -1 : 0;
    std::memcpy(&result, bytes.data(), length);
    return result;
  }

 private:
  std::string_view rest_;
};

enum class Global : uint8_t { RebuildTensorV2, RebuildTensorV3, OrderedDict, UntypedStorage, TypedStorage };

struct NamedGlobal {
  std::string_view module;
  std::string_view name;
  Global global;
  at::ScalarType dtype = at::kByte;  // of a typed storage
};

constexpr std::array kGlobals{
    NamedGlobal{"torch._utils", "_rebuild_tensor_v2", Global::RebuildTensorV2},
    NamedGlobal{"torch._utils", "_rebuild_tensor_v3", Global::RebuildTensorV3},
    NamedGlobal{"collections", "OrderedDict", Global::OrderedDict},
    NamedGlobal{"torch.storage", "UntypedStorage", Global::UntypedStorage},
    NamedGlobal{"torch", "FloatStorage", Global::TypedStorage, at::kFloat},
    NamedGlobal{"torch", "BFloat16Storage", Global::TypedStorage, at::kBFloat16},
    NamedGlobal{"torch", "HalfStorage", Global::TypedStorage, at::kHalf},
    NamedGlobal{"torch", "DoubleStorage", Global::TypedStorage, at::kDouble},
    NamedGlobal{"torch", "LongStorage", Global::TypedStorage, at::kLong},
    NamedGlobal{"torch", "IntStorage", Global::TypedStorage, at::kInt},
    NamedGlobal{"torch", "ShortStorage", Global::TypedStorage, at::kShort},
    NamedGlobal{"torch", "CharStorage", Global::TypedStorage, at::kChar},
    NamedGlobal{"torch", "ByteStorage", Global::TypedStorage, at::kByte},
    NamedGlobal{"torch", "BoolStorage", Global::TypedStorage, at::kBool},
    NamedGlobal{"torch", "ComplexFloatStorage", Global::TypedStorage, at::kComplexFloat},
    NamedGlobal{"torch", "ComplexDoubleStorage", Global::TypedStorage, at::kComplexDouble},
};

constexpr std::array kDTypes{
    at::kFloat,
    at::kBFloat16,
    at::kHalf,
    at::kDouble,
    at::kLong,
    at::kInt,
    at::kShort,
    at::kChar,
    at::kByte,
    at::kBool,
    at::kComplexHalf,
    at::kComplexFloat,
    at::kComplexDouble,
    at::kUInt16,
    at::kUInt32,
    at::kUInt64,
    at::kFloat8_e4m3fn,
    at::kFloat8_e5m2,
    at::kFloat8_e4m3fnuz,
    at::kFloat8_e5m2fnuz,
};

struct Storage {
  c10::intrusive_ptr<c10::StorageImpl> impl;
  const NamedGlobal* type;
};

// What stands on the stack. An OrderedDict that is empty becomes an object when somebody looks at it: torch writes one
// for each tensor, and nobody does.
struct Value {
  enum class Kind : uint8_t { Object, EmptyOrderedDict, Global, Storage };

  Kind kind;
  uint32_t index = 0;  // of a global in the table, or of a storage
  py::object object = {};
};

// What a pickle keeps in its memo. torch.save numbers all there is in order, and fetches little of it again.
class Memo {
 public:
  // An item that is put, seen ahead.
  void expect(uint32_t number) {
    require(number == states_.size());
    states_.push_back(kUnwanted);
  }

  void expect_fetch(uint32_t number) {
    require(number < states_.size());
    states_[number] = kWanted;
  }

  bool is_wanted(uint32_t number) const { return states_.at(number) != kUnwanted; }

  // For a wanted one.
  void put(uint32_t number, const Value& value) {
    states_.at(number) = static_cast<uint32_t>(kFirst + kept_.size());
    kept_.push_back(value);
  }

  const Value& fetch(uint32_t number) const {
    require(states_.at(number) >= kFirst);
    return kept_[states_[number] - kFirst];
  }

 private:
  static constexpr uint32_t kUnwanted = 0;
  static constexpr uint32_t kWanted = 1;
  static constexpr uint32_t kFirst = 2;

  std::vector<uint32_t> states_;  // by number; from kFirst on the place among the kept
  std::vector<Value> kept_;
};

// Looks through a pickle for what will be asked of its memo.
Memo expected_memo(std::string_view pickle) {
  Memo memo;
  Cursor cursor(pickle);
  while (true) {
    switch (cursor.byte()) {
      case kStop:
        return memo;
      case kBinPut:
        memo.expect(cursor.byte());
        break;
      case kLongBinPut:
        memo.expect(cursor.number<uint32_t>());
        break;
      case kBinGet:
        memo.expect_fetch(cursor.byte());
        break;
      case kLongBinGet:
        memo.expect_fetch(cursor.number<uint32_t>());
        break;
      case kGlobal:
        cursor.line();
        cursor.line();
        break;
      case kBinUnicode:
        cursor.take(cursor.number<uint32_t>());
        break;
      case kLong1:
        cursor.take(cursor.byte());
        break;
      case kBinFloat:
        cursor.take(8);
        break;
      case kBinInt:
        cursor.take(4);
        break;
      case kBinInt2:
        cursor.take(2);
        break;
      case kProto:
      case kBinInt1:
        cursor.take(1);
        break;
      default:  // has no argument, or stops the decoder when it gets there
        break;
    }
  }
}

PyObject* object_of(Value& value) {
  if (value.kind == Value::Kind::EmptyOrderedDict) {
    value = {Value::Kind::Object, 0, checked(PyODict_New())};
  }
  require(value.kind == Value::Kind::Object);
  return value.object.ptr();
}

bool is_named(Value& value, std::string_view text) {
  PyObject* object = object_of(value);
  return PyUnicode_CheckExact(object) && PyUnicode_GET_LENGTH(object) == static_cast<Py_ssize_t>(text.size()) &&
         PyUnicode_CompareWithASCIIString(object, text.data()) == 0;
}

bool is_key(PyObject* object) {
  return PyUnicode_CheckExact(object) || PyLong_CheckExact(object) || PyFloat_CheckExact(object) ||
         PyBool_Check(object) || object == Py_None;
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

int64_t count_from(PyObject* object) {
  require(PyLong_CheckExact(object));
  int overflow = 0;
  const int64_t count = PyLong_AsLongLongAndOverflow(object, &overflow);
  require(overflow == 0 && count >= 0);
  return count;
}

using Counts = c10::SmallVector<int64_t, 5>;

Counts counts_from(PyObject* tuple) {
  require(PyTuple_CheckExact(tuple));
  Counts counts;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    counts.push_back(count_from(PyTuple_GET_ITEM(tuple, i)));
  }
  return counts;
}

int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  require(!__builtin_mul_overflow(a, b, &result));
  return result;
}

int64_t sum(int64_t a, int64_t b) {
  int64_t result = 0;
  require(!__builtin_add_overflow(a, b, &result));
  return result;
}

// How many elements a storage must have for a view of it.
int64_t elements_needed(const Counts& sizes, const Counts& strides, int64_t offset) {
  require(sizes.size() == strides.size());
  int64_t number = 1;
  int64_t last = offset;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    number = product(number, sizes[dim]);
    last = sizes[dim] == 0 ? last : sum(last, product(sizes[dim] - 1, strides[dim]));
  }
  return number == 0 ? offset : sum(last, 1);
}

// Torch's operations may kill the process where it is not, and archives that others have packed are not.
bool is_aligned(const c10::StorageImpl& storage, at::ScalarType dtype) {
  return reinterpret_cast<uintptr_t>(storage.data()) % c10::elementSize(dtype) == 0;
}

class Decoder {
 public:
  Decoder(std::string_view pickle, const StorageOf& storage_of)
      : memo_(expected_memo(pickle)), cursor_(pickle), storage_of_(storage_of) {}

  py::object run() {
    require(cursor_.byte() == kProto && cursor_.byte() == 2);
    unsigned char op = cursor_.byte();
    for (; op != kStop; op = cursor_.byte()) {
      step(op);
    }
    require(marks_.empty() && stack_.size() == 1);
    object_of(stack_.back());
    return std::move(stack_.back().object);
  }

 private:
  void step(unsigned char op) {
    switch (op) {
      case kNone:
        return push(py::none());
      case kNewTrue:
        return push(py::bool_(true));
      case kNewFalse:
        return push(py::bool_(false));
      case kBinInt:
        return push(checked(PyLong_FromLong(cursor_.number<int32_t>())));
      case kBinInt1:
        return push(checked(PyLong_FromLong(cursor_.byte())));
      case kBinInt2:
        return push(checked(PyLong_FromLong(cursor_.number<uint16_t>())));
      case kLong1:
        return push(checked(PyLong_FromLongLong(cursor_.long1())));
      case kBinFloat:
        return push(checked(PyFloat_FromDouble(cursor_.big_endian_double())));
      case kBinUnicode:
        return push(text(cursor_.take(cursor_.number<uint32_t>())));
      case kEmptyTuple:
        return push(checked(PyTuple_New(0)));
      case kEmptyList:
        return push(checked(PyList_New(0)));
      case kEmptyDict:
        return push(checked(PyDict_New()));
      case kMark:
        return marks_.push_back(stack_.size());
      case kTuple1:
        return make_tuple(1);
      case kTuple2:
        return make_tuple(2);
      case kTuple3:
        return make_tuple(3);
      case kTuple:
        return make_tuple(items_since_mark());
      case kAppend:
        return append(1);
      case kAppends:
        return append(items_since_mark());
      case kSetItem:
        return set_items(2);
      case kSetItems:
        return set_items(items_since_mark());
      case kGlobal:
        return push_global();
      case kReduce:
        return reduce();
      case kBuild:
        return build();
      case kBinPut:
        return put(cursor_.byte());
      case kLongBinPut:
        return put(cursor_.number<uint32_t>());
      case kBinGet:
        return get(cursor_.byte());
      case kLongBinGet:
        return get(cursor_.number<uint32_t>());
      default:
        throw NotPlain();
    }
  }

  void push(py::object object) { stack_.push_back({Value::Kind::Object, 0, std::move(object)}); }

  // The topmost values, none of them from before the last mark, the first one lowest.
  std::span<Value> top(size_t count) {
    const size_t floor = marks_.empty() ? 0 : marks_.back();
    require(count <= stack_.size() - floor);
    return std::span(stack_).last(count);
  }

  void drop(size_t count) { stack_.resize(stack_.size() - count, Value{}); }

  size_t items_since_mark() {
    require(!marks_.empty());
    const size_t count = stack_.size() - marks_.back();
    marks_.pop_back();
    return count;
  }

  static py::object text(std::string_view utf8) {
    PyObject* decoded = PyUnicode_DecodeUTF8(utf8.data(), static_cast<Py_ssize_t>(utf8.size()), "surrogatepass");
    return checked(decoded);
  }

  void put(uint32_t number) {
    Value& value = top(1).front();
    if (memo_.is_wanted(number)) {
      if (value.kind == Value::Kind::EmptyOrderedDict) {
        object_of(value);  // from now on one and the same
      }
      memo_.put(number, value);
    }
  }

  void get(uint32_t number) { stack_.push_back(memo_.fetch(number)); }

  void make_tuple(size_t count) {
    const std::span<Value> items = top(count);
    for (const Value& item : items) {
      if (item.kind == Value::Kind::Global || item.kind == Value::Kind::Storage) {
        return call(count);
      }
    }
    py::object tuple = checked(PyTuple_New(static_cast<Py_ssize_t>(count)));
    for (size_t i = 0; i < count; ++i) {
      object_of(items[i]);
      PyTuple_SET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i), items[i].object.release().ptr());
    }
    drop(count);
    push(std::move(tuple));
  }

  // The topmost values are the arguments of what comes next.
  void call(size_t count) {
    for (unsigned char op = cursor_.peek(); op == kBinPut || op == kLongBinPut; op = cursor_.peek()) {
      cursor_.take(1);
      require(!memo_.is_wanted(op == kBinPut ? cursor_.byte() : cursor_.number<uint32_t>()));
    }
    const unsigned char op = cursor_.byte();
    if (op == kBinPersId) {
      const uint32_t index = storage(top(count));
      drop(count);
      stack_.push_back({Value::Kind::Storage, index});
    } else {
      require(op == kReduce);
      py::object tensor = rebuilt(global_of(top(count + 1).front()), top(count));
      drop(count + 1);
      push(std::move(tensor));
    }
  }

  static const NamedGlobal& global_of(const Value& value) {
    require(value.kind == Value::Kind::Global);
    return kGlobals[value.index];
  }

  void push_global() {
    const std::string_view module = cursor_.line();
    const std::string_view name = cursor_.line();
    for (uint32_t index = 0; index < kGlobals.size(); ++index) {
      if (kGlobals[index].module == module && kGlobals[index].name == name) {
        stack_.push_back({Value::Kind::Global, index});
        return;
      }
    }
    require(module == "torch");
    for (const at::ScalarType dtype : kDTypes) {
      THPDtype* object = torch::getTHPDtype(dtype);
      if (name == object->name) {
        return push(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(object)));
      }
    }
    throw NotPlain();
  }

  void reduce() {
    const std::span<Value> call = top(2);
    PyObject* arguments = object_of(call[1]);
    require(PyTuple_CheckExact(arguments) && PyTuple_GET_SIZE(arguments) == 0);
    require(global_of(call[0]).global == Global::OrderedDict);
    drop(2);
    stack_.push_back({Value::Kind::EmptyOrderedDict});
  }

  void build() {
    const std::span<Value> values = top(2);
    PyObject* state = object_of(values[1]);
    PyObject* dict = object_of(values[0]);
    require(PyODict_CheckExact(dict) && PyDict_CheckExact(state) && has_only_str_keys(state));
    check(PyDict_Update(checked(PyObject_GenericGetDict(dict, nullptr)).ptr(), state));
    drop(1);
  }

  void append(size_t count) {
    const std::span<Value> values = top(count + 1);
    PyObject* list = object_of(values[0]);
    require(PyList_CheckExact(list));
    for (Value& item : values.subspan(1)) {
      check(PyList_Append(list, object_of(item)));
    }
    drop(count);
  }

  void set_items(size_t count) {
    require(count % 2 == 0);
    const std::span<Value> values = top(count + 1);
    PyObject* dict = object_of(values[0]);
    const bool is_ordered = PyODict_CheckExact(dict);
    require(is_ordered || PyDict_CheckExact(dict));
    for (size_t i = 1; i < values.size(); i += 2) {
      PyObject* key = object_of(values[i]);
      PyObject* value = object_of(values[i + 1]);
      require(is_key(key));
      check(is_ordered ? PyODict_SetItem(dict, key, value) : PyDict_SetItem(dict, key, value));
    }
    drop(count);
  }

  // ("storage", type, key, location, elements): a record, which is read once. Where it was when it was saved does not
  // matter.
  uint32_t storage(std::span<Value> id) {
    require(id.size() == 5 && is_named(id[0], "storage"));
    const NamedGlobal& type = global_of(id[1]);
    require(type.global == Global::UntypedStorage || type.global == Global::TypedStorage);
    require(PyUnicode_CheckExact(object_of(id[2])) && PyUnicode_CheckExact(object_of(id[3])));
    const int64_t item_size = static_cast<int64_t>(c10::elementSize(type.dtype));
    const auto bytes = static_cast<size_t>(product(count_from(object_of(id[4])), item_size));
    Py_ssize_t length = 0;
    const char* key = PyUnicode_AsUTF8AndSize(id[2].object.ptr(), &length);
    check(key == nullptr);
    require(std::strlen(key) == static_cast<size_t>(length));  // torch's reader stops at a null
    const auto [found, is_new] =
        storage_of_key_.emplace(std::string(key, static_cast<size_t>(length)), static_cast<uint32_t>(storages_.size()));
    if (is_new) {
      storages_.push_back({storage_of_(found->first, bytes), &type});
    }
    const Storage& storage = storages_[found->second];
    require(storage.type == &type && storage.impl->nbytes() == bytes);
    return found->second;
  }

  // (storage, offset, sizes, strides, requires_grad, backward hooks) and, of an untyped storage, the dtype.
  py::object rebuilt(const NamedGlobal& function, std::span<Value> arguments) {
    const bool is_untyped = function.global == Global::RebuildTensorV3;
    require(is_untyped || function.global == Global::RebuildTensorV2);
    require(arguments.size() == (is_untyped ? 7 : 6) && arguments[0].kind == Value::Kind::Storage);
    const Storage& storage = storages_[arguments[0].index];
    require((storage.type->global == Global::UntypedStorage) == is_untyped);
    require(object_of(arguments[4]) == Py_False && arguments[5].kind == Value::Kind::EmptyOrderedDict);
    at::ScalarType dtype = storage.type->dtype;
    if (is_untyped) {
      PyObject* object = object_of(arguments[6]);
      require(THPDtype_Check(object));
      dtype = reinterpret_cast<THPDtype*>(object)->scalar_type;
    }
    const int64_t offset = count_from(object_of(arguments[1]));
    const Counts sizes = counts_from(object_of(arguments[2]));
    const Counts strides = counts_from(object_of(arguments[3]));
    const auto held = static_cast<int64_t>(storage.impl->nbytes() / c10::elementSize(dtype));
    require(elements_needed(sizes, strides, offset) <= held && is_aligned(*storage.impl, dtype));
    return checked(THPVariable_Wrap(tensor_over(memory_, c10::Storage(storage.impl), dtype, sizes, strides, offset)));
  }

  Memo memo_;
  Cursor cursor_;
  const StorageOf& storage_of_;
  ResultMemory memory_;
  std::vector<Storage> storages_;
  std::unordered_map<std::string, uint32_t> storage_of_key_;
  std::vector<Value> stack_;
  std::vector<size_t> marks_;
};

}  // namespace

py::object decode_plain(std::string_view pickle, const StorageOf& storage_of) {
  try {
    return Decoder(pickle, storage_of).run();
  } catch (const py::error_already_set& error) {
    if (error.matches(PyExc_UnicodeError)) {  // torch has its own words for that
      throw NotPlain();
    }
    throw;
  }
}

}  // namespace fastopt
