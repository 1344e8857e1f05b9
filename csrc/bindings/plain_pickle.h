// Pickles of torch's that hold plain values only.
#pragma once

#include <c10/core/StorageImpl.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <string>
#include <string_view>

namespace fastopt {

// Note [Plain pickles]
// A checkpoint of very many tensors is a pickle of tens of millions of bytes, over which torch's unpickler for
// weights_only=True, a loop in Python, takes most of a minute. What torch.save writes for an optimizer's state needs
// few of a pickle's means, so those are decoded here; a file that needs any other goes to torch's unpickler as a whole,
// which gives the same results and refuses what it refuses. Nothing is decoded here that torch refuses.
//
// Loading must not run code of the file's, whoever made it. Python's own unpickler in C would be nearly as fast, but is
// made to call things: whatever `find_class` hands out is called by REDUCE with any arguments and changed by BUILD,
// objects that came about are written to by APPENDS and SETITEMS through their own methods, and extension codes are
// looked up in a registry of the process past `find_class`; six bytes (LONG_BINPUT) make it take 64 GiB. So here is a
// machine without calls and attributes instead:
//
//  - It knows the operations that torch.save writes, in protocol 2, and no other: there is no INST, OBJ, NEWOBJ, EXT,
//    no protocol 0 or 4, no persistent id in text.
//  - A global is a member of a closed table, and never an object of Python's: nothing is imported or looked up by name.
//    It may be an item of the arguments of a call that is made of it at once, and nothing else: it gets into no
//    container and so not into the result. (A dtype is an object, and may; it cannot be changed.)
//  - REDUCE is no call but one of three things this file does itself: an empty OrderedDict, and a tensor over a storage
//    in the two ways torch writes it. Each argument is checked for its exact type and range first.
//  - A persistent id is a storage: a record of the archive, within whose bytes it lies.
//  - Items go into exact dicts, OrderedDicts and lists that were made here; keys are exact str, int, float, bool or
//    None, whose hashes are Python's own. BUILD puts an exact dict with str keys into the attributes of an OrderedDict
//    (torch.nn.Module.state_dict has its versions there), and does nothing else.
//  - What is read is a copy that nobody changes, and each read is checked against its end. Lengths are of what is
//    there, so nothing is allocated by a number in the file alone; of the memo, only what is fetched again is kept, in
//    a table by number. Nesting takes a stack of this machine's, not of the process.
//
// Whatever is else than that throws NotPlain, and what was made is dropped: it is nobody's yet.
struct NotPlain {};

// The storage of a record, of this many bytes; throws NotPlain where there is none.
using StorageOf = std::function<c10::intrusive_ptr<c10::StorageImpl>(const std::string& key, size_t bytes)>;

// What a pickle holds. Throws NotPlain, what `storage_of` throws, and Python's MemoryError.
pybind11::object decode_plain(std::string_view pickle, const StorageOf& storage_of);

}  // namespace fastopt
