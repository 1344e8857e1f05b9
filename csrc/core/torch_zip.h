// The zip file of torch.save, written by ourselves.
//
// Note [Container]
// torch's own writer takes 0.55 to 0.9 s for 300,000 records of 256 bytes, called from C++ and with nothing written to
// a disk: more than all else that saving them takes. So for content that we pickle ourselves, the container is ours as
// well. It has the bytes that torch's has (but for the text of the record .data/serialization_id): records that are
// stored and not compressed, their data aligned by a field of padding, sizes and checksum behind the data, and what is
// beyond 32 bits in fields of zip64. tests/test_torch_write.py holds it to torch's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fastopt {

// Where the records of a file lie, one after the other.
class ZipLayout {
 public:
  struct Place {
    uint64_t header;  // offset of what stands before the data
    uint64_t data;
    uint64_t padding;
    bool is_large;  // its size or its offset is beyond 32 bits
  };

  // `prefix` is the length of what stands before every name.
  ZipLayout(size_t prefix, uint64_t alignment) : prefix_(prefix), alignment_(alignment) {}

  // The place of the next record.
  Place next(std::string_view name, uint64_t size);

  // Behind the last one.
  uint64_t end() const { return end_; }

  // Bytes of the whole file, once it has no more records.
  uint64_t file_size() const;

 private:
  size_t prefix_;
  uint64_t alignment_;
  uint64_t end_ = 0;
  uint64_t directory_ = 0;  // bytes
};

// Writes to a file from an offset on, some MiB at a time, and leaves out what others write. Throws std::system_error
// where the file cannot be written.
class FileOutput {
 public:
  explicit FileOutput(int file, uint64_t offset = 0);

  void append(const void* data, size_t size);
  void skip(uint64_t size);
  void flush();

  // Where in the file the next byte goes.
  uint64_t offset() const { return offset_ + buffer_.size(); }

 private:
  int file_;
  uint64_t offset_;  // of the buffer's first byte
  std::vector<char> buffer_;
};

// Writes the records of a file, and what holds them together. Throws what FileOutput does.
class ZipWriter {
 public:
  // All names begin with `folder` and a slash. The file begins where `output` is, and its alignment counts from there.
  ZipWriter(FileOutput& output, std::string_view folder, uint64_t alignment);

  // A record; returns its checksum.
  uint32_t add(std::string_view name, const void* data, uint64_t size);

  // A record whose data others have written or will write, and its checksum.
  void add_around(std::string_view name, uint64_t size, uint32_t crc);

  // All that follows the last record. `add` and `add_around` have been called in the order of a ZipLayout. What is
  // written may still be in `output`.
  void finish();

 private:
  ZipLayout::Place begin(std::string_view name, uint64_t size);
  void end(std::string_view name, uint64_t size, uint32_t crc, const ZipLayout::Place& place);
  static void put_sizes(std::string& field, uint64_t size, uint64_t packed, const ZipLayout::Place& place);

  FileOutput& output_;
  std::string prefix_;
  ZipLayout layout_;
  std::string scratch_;
  std::string directory_;
  uint64_t records_ = 0;
};

}  // namespace fastopt
