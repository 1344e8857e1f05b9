#include "torch_zip.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "crc32.h"

namespace fastopt {
namespace {

constexpr uint64_t kLimit = 0xFFFFFFFF;  // stands for what is in a field of zip64, and so is itself in one
constexpr size_t kHeader = 30;           // bytes before a name
constexpr size_t kEntry = 46;            // the same in the directory
constexpr size_t kTail = 56 + 20 + 22;   // bytes behind the directory
constexpr size_t kFieldHead = 4;         // id and length
constexpr uint16_t kHasDescriptor = 1 << 3;
constexpr uint16_t kNamesAreUtf8 = 1 << 11;
constexpr size_t kBuffer = size_t{4} << 20;

// Numbers in a zip file are little-endian.
template <class Number>
void put(std::string& to, Number number) {
  for (size_t i = 0; i < sizeof(Number); ++i) {
    to.push_back(static_cast<char>(static_cast<uint64_t>(number) >> (8 * i)));
  }
}

uint32_t limited(uint64_t number) {
  return static_cast<uint32_t>(std::min(number, kLimit));
}

size_t length_of_sizes(uint64_t size, uint64_t offset) {
  const size_t length = (size >= kLimit ? 16 : 0) + (offset >= kLimit ? 8 : 0);
  return length == 0 ? 0 : kFieldHead + length;
}

uint16_t flags(uint64_t size) {
  return kNamesAreUtf8 | (size > 0 ? kHasDescriptor : uint16_t{0});
}

size_t length_of_descriptor(uint64_t size, bool is_large) {
  if (size == 0) {
    return 0;
  }
  return is_large ? 24 : 16;
}

}  // namespace

ZipLayout::Place ZipLayout::next(std::string_view name, uint64_t size) {
  const uint64_t header = end_;
  const size_t sizes = length_of_sizes(size, header);
  const uint64_t earliest = header + kHeader + prefix_ + name.size() + sizes + kFieldHead;
  const uint64_t data = (earliest + alignment_ - 1) / alignment_ * alignment_;
  end_ = data + size + length_of_descriptor(size, sizes > 0);
  directory_ += kEntry + prefix_ + name.size() + sizes;
  return {header, data, data - earliest, sizes > 0};
}

uint64_t ZipLayout::file_size() const {
  return end_ + directory_ + kTail;
}

FileOutput::FileOutput(int file, uint64_t offset) : file_(file), offset_(offset) {
  buffer_.reserve(kBuffer);
}

void FileOutput::append(const void* data, size_t size) {
  const auto* from = static_cast<const char*>(data);
  while (size > 0) {
    const size_t part = std::min(size, kBuffer - buffer_.size());
    buffer_.insert(buffer_.end(), from, from + part);
    from += part;
    size -= part;
    if (buffer_.size() == kBuffer) {
      flush();
    }
  }
}

void FileOutput::skip(uint64_t size) {
  flush();
  offset_ += size;
}

void FileOutput::flush() {
  size_t done = 0;
  while (done < buffer_.size()) {
    const auto offset = static_cast<off_t>(offset_ + done);
    const ssize_t written = pwrite(file_, buffer_.data() + done, buffer_.size() - done, offset);
    if (written < 0 && errno != EINTR) {
      throw std::system_error(errno, std::generic_category());
    }
    done += static_cast<size_t>(std::max<ssize_t>(written, 0));
  }
#if defined(__linux__)
  if (buffer_.size() == kBuffer) {  // begins its way to the disk; no more than a hint
    sync_file_range(file_, static_cast<off_t>(offset_), static_cast<off_t>(kBuffer), SYNC_FILE_RANGE_WRITE);
  }
#endif
  offset_ += buffer_.size();
  buffer_.clear();
}

ZipWriter::ZipWriter(FileOutput& output, std::string_view folder, uint64_t alignment)
    : output_(output), prefix_(std::string(folder) + "/"), layout_(prefix_.size(), alignment) {}

uint32_t ZipWriter::add(std::string_view name, const void* data, uint64_t size) {
  const ZipLayout::Place place = begin(name, size);
  output_.append(data, size);
  const uint32_t crc = crc32(0, data, size);
  end(name, size, crc, place);
  return crc;
}

void ZipWriter::add_around(std::string_view name, uint64_t size, uint32_t crc) {
  const ZipLayout::Place place = begin(name, size);
  output_.skip(size);
  end(name, size, crc, place);
}

// The header of a record. Torch's writer knows neither versions nor times; sizes and checksum come later.
ZipLayout::Place ZipWriter::begin(std::string_view name, uint64_t size) {
  const ZipLayout::Place place = layout_.next(name, size);
  std::string& header = scratch_;
  header.assign("PK\x03\x04");
  put(header, uint16_t{0});
  put(header, flags(size));
  header.append(18, '\0');
  put(header, static_cast<uint16_t>(prefix_.size() + name.size()));
  put(header, static_cast<uint16_t>(length_of_sizes(size, place.header) + kFieldHead + place.padding));
  header.append(prefix_).append(name);
  put_sizes(header, size, 0, place);  // that is behind the data, to torch's writer
  header.append("FB");
  put(header, static_cast<uint16_t>(place.padding));
  header.append(place.padding, 'Z');
  output_.append(header.data(), header.size());
  return place;
}

// What follows a record's data, and what the directory says of it.
void ZipWriter::end(std::string_view name, uint64_t size, uint32_t crc, const ZipLayout::Place& place) {
  if (size > 0) {
    std::string& descriptor = scratch_;
    descriptor.assign("PK\x07\x08");
    put(descriptor, crc);
    for (int i = 0; i < 2; ++i) {  // as compressed, and as it is
      if (place.is_large) {
        put(descriptor, size);
      } else {
        put(descriptor, static_cast<uint32_t>(size));
      }
    }
    output_.append(descriptor.data(), descriptor.size());
  }
  directory_.append("PK\x01\x02");
  put(directory_, uint32_t{0});
  put(directory_, flags(size));
  directory_.append(6, '\0');
  put(directory_, crc);
  put(directory_, limited(size));
  put(directory_, limited(size));
  put(directory_, static_cast<uint16_t>(prefix_.size() + name.size()));
  put(directory_, static_cast<uint16_t>(length_of_sizes(size, place.header)));
  directory_.append(10, '\0');
  put(directory_, limited(place.header));
  directory_.append(prefix_).append(name);
  put_sizes(directory_, size, size, place);
  ++records_;
}

// The field of zip64; `packed` is the size of the data as it is stored.
void ZipWriter::put_sizes(std::string& field, uint64_t size, uint64_t packed, const ZipLayout::Place& place) {
  if (!place.is_large) {
    return;
  }
  put(field, uint16_t{1});
  put(field, static_cast<uint16_t>(length_of_sizes(size, place.header) - kFieldHead));
  if (size >= kLimit) {
    put(field, size);
    put(field, packed);
  }
  if (place.header >= kLimit) {
    put(field, place.header);
  }
}

void ZipWriter::finish() {
  const uint64_t start = layout_.end();
  const uint64_t size = directory_.size();
  std::string& tail = directory_;
  tail.append("PK\x06\x06");
  put(tail, uint64_t{44});  // bytes that follow of this
  put(tail, uint16_t{0x031E});
  put(tail, uint16_t{45});
  put(tail, uint64_t{0});
  put(tail, records_);
  put(tail, records_);
  put(tail, size);
  put(tail, start);
  tail.append("PK\x06\x07");
  put(tail, uint32_t{0});
  put(tail, start + size);
  put(tail, uint32_t{1});
  tail.append("PK\x05\x06");
  put(tail, uint32_t{0});
  for (int i = 0; i < 2; ++i) {
    put(tail, static_cast<uint16_t>(std::min(records_, uint64_t{0xFFFF})));
  }
  put(tail, limited(size));
  put(tail, limited(start));
  put(tail, uint16_t{0});
  output_.append(tail.data(), tail.size());
}

}  // namespace fastopt
