// Reading the saved state: its entries, the parameters they belong to, and what the dicts among them hold.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <vector>

namespace fastopt {

// What a dict holds under a key, or a list at a place (then without a key).
struct Item {
  pybind11::object key;
  pybind11::object value;
  bool sole;  // its container holds the only reference to the value
};

Item borrow(PyObject* key, PyObject* value);

// The items of a dict; nothing where a key is no str.
std::optional<std::vector<Item>> items_of(PyObject* dict);

// An entry of the saved state.
struct Entry {
  Item item;               // saved id and state
  pybind11::object param;  // null where the id belongs to no parameter
  bool is_dict;            // an exact dict with str keys only: `items` are its own
  std::span<const Item> items;
};

// Note [Reading ahead]
// A state of many small tensors is larger than any cache, and whoever follows it pointer by pointer (dict, its table,
// tensor object, tensor, storage) waits for memory at every step. So entries are read in blocks, and a block in rounds:
// each round reads one step of all its entries, and asks for the memory that the next round will read.
class EntryReader {
 public:
  EntryReader(const pybind11::dict& saved_state, const pybind11::dict& id_map);

  // The next entries, held until the next call; none at the end. Raises what Python raises when the dict has changed
  // size, and what an odd saved id raises when it is hashed or compared.
  std::span<const Entry> next();

 private:
  void read_entries();
  void find_params();
  void gather_items();
  void hold_items();

  const pybind11::dict& saved_state_;
  const pybind11::dict& id_map_;
  const Py_ssize_t size_;
  Py_ssize_t position_ = 0;

  struct Range {
    size_t begin;
    size_t end;
  };

  std::vector<Entry> entries_;
  std::vector<Range> ranges_;  // of each entry in `raw_` and `items_`
  std::vector<std::pair<PyObject*, PyObject*>> raw_;
  std::vector<Item> items_;
};

}  // namespace fastopt
