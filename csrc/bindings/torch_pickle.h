// The pickle of torch.save, for content that is plain.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/flat_hash_map.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastopt {

// Note [Plain content]
// A state dict is dicts, lists, tuples, strings, numbers, and plain tensors (Note [Plain tensors]) without attributes
// or hooks. What torch's pickler does to these is simple, and takes it 30 us a tensor, as it asks Python about every
// object. Here it takes less than 1 us, and gives the same bytes: those of pickle's protocol 2, with the same memo.
// Content with anything else in it is torch's to pickle as a whole.

// What a storage of the file holds: the memory of one that is in the content, or a tensor that is cast on the way.
struct Stored {
  c10::Storage memory;  // without a value where there is a cast
  at::Tensor tensor;    // what is cast
  at::ScalarType dtype;
  uint64_t size;                 // bytes in the file
  std::optional<uint32_t> name;  // index of its name in the pickle's memo, once that is there
};

class TorchPickle {
 public:
  // Thrown where content is not plain.
  struct NotPlain {};

  // `dtypes`: the dtype that a tensor gets in the file, by its id.
  explicit TorchPickle(const pybind11::dict& dtypes);

  // Pickles content. Throws NotPlain.
  void dump(pybind11::handle content);

  std::string take_bytes() { return std::move(out_); }
  std::vector<Stored> take_storages() { return std::move(storages_); }

 private:
  void save(PyObject* object, size_t depth);
  bool save_atom(PyObject* object);
  void save_int(PyObject* object);
  void save_int(int64_t number);
  void save_string(PyObject* object);
  void save_dict(PyObject* object, size_t depth);
  void save_list(PyObject* object, size_t depth);
  void save_tuple(PyObject* object, size_t depth);
  void save_ints(at::IntArrayRef numbers);
  void save_global(const char* name);
  void save_tensor(PyObject* object);
  void save_storage(size_t index, at::ScalarType dtype);
  void save_name(size_t index);
  size_t storage_of(const at::Tensor& tensor);
  void check_views() const;
  at::ScalarType dtype_of(PyObject* object, const at::Tensor& tensor) const;

  bool recall(const void* object);
  void recall_index(uint32_t index);
  void remember(const void* object);
  uint32_t remember_new();
  void put_memo(uint32_t index);
  template <class Number>
  void put(Number number);

  const pybind11::dict& dtypes_;
  const bool casts_;
  std::string out_;
  uint32_t next_ = 0;                               // index in the memo
  ska::flat_hash_map<const void*, uint32_t> memo_;  // by what was pickled, or by the name of a global
  std::vector<Stored> storages_;
  ska::flat_hash_map<const void*, size_t> shared_;  // index of a storage that several tensors use
  const pybind11::object word_storage_;
  const pybind11::object word_cpu_;
};

}  // namespace fastopt
