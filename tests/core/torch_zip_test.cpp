// Checksums, and files of torch.save's form, to the byte; torch itself is held against them in
// tests/test_torch_write.py.
#include "torch_zip.h"

#include <unistd.h>

#include <cstdio>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "core_test.h"
#include "crc32.h"

namespace core_test {
namespace {

// A file without a name, gone with this.
class File {
 public:
  File() : file_(std::tmpfile()) { check(file_ != nullptr, "no temporary file"); }
  ~File() { std::fclose(file_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int number() const { return fileno(file_); }

  void put(uint64_t offset, std::string_view data) const {
    check(pwrite(number(), data.data(), data.size(), static_cast<off_t>(offset)) == ssize_t(data.size()), "no write");
  }

  std::string content() const {
    std::string all(static_cast<size_t>(lseek(number(), 0, SEEK_END)), '\0');
    check(pread(number(), all.data(), all.size(), 0) == ssize_t(all.size()), "no read");
    return all;
  }

 private:
  std::FILE* file_;
};

uint32_t bit_by_bit(std::string_view data) {
  uint32_t crc = ~uint32_t{0};
  for (const char byte : data) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320 : 0);
    }
  }
  return ~crc;
}

std::string bytes(size_t count) {
  std::string data(count, '\0');
  for (size_t i = 0; i < count; ++i) {
    data[i] = static_cast<char>(i * i * 7 + i / 256);
  }
  return data;
}

void test_checksums_of_all_lengths_and_in_parts() {
  check(fastopt::crc32(0, "123456789", 9) == 0xCBF43926, "the checksum that the standard gives");
  for (size_t count = 0; count < 200; ++count) {  // folded from 64 on
    Buffer buffer(static_cast<int64_t>(count), 1);
    const std::string data = bytes(count);
    std::memcpy(buffer.data(), data.data(), count);
    check(fastopt::crc32(0, buffer.data(), count) == bit_by_bit(data), "the checksum of ", count, " bytes");
    for (size_t part = 0; part <= count; ++part) {
      const uint32_t first = fastopt::crc32(0, buffer.data(), part);
      check(fastopt::crc32(first, buffer.data() + part, count - part) == bit_by_bit(data), "in parts, ", part);
    }
  }
}

void test_a_record_that_others_write_is_as_one_written_here() {
  const std::vector<size_t> sizes{0, 1, 63, 64, 5'000, 3};
  File whole, around;
  fastopt::FileOutput to_whole(whole.number()), to_around(around.number());
  fastopt::ZipWriter first(to_whole, "folder", 64), second(to_around, "folder", 64);
  fastopt::ZipLayout layout(sizeof "folder/" - 1, 64);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const std::string name = text("data/", i), data = bytes(sizes[i]);
    const uint32_t crc = first.add(name, data.data(), data.size());
    check(crc == bit_by_bit(data), "the checksum of record ", i);
    second.add_around(name, data.size(), crc);
    const auto place = layout.next(name, data.size());
    check(place.data % 64 == 0 && place.data >= place.header, "the place of record ", i);
    around.put(place.data, data);
  }
  first.finish();
  second.finish();
  to_whole.flush();
  to_around.flush();
  const std::string content = whole.content();
  check(content.size() == layout.file_size(), "the size of the file is not the one expected");
  check(content == around.content(), "the files differ");
  check(content.substr(layout.end(), 4) == "PK\x01\x02", "the directory is not where the records end");
}

void test_a_large_record_goes_through_the_buffer_in_pieces() {
  const std::string data = bytes((size_t{9} << 20) + 5);
  File file;
  fastopt::FileOutput output(file.number());
  fastopt::ZipWriter zip(output, "a", 64);
  zip.add("b", data.data(), data.size());
  zip.finish();
  output.flush();
  fastopt::ZipLayout layout(2, 64);
  check(file.content().substr(layout.next("b", data.size()).data, data.size()) == data, "the data is another");
}

// Files of torch.distributed.checkpoint hold many of these, one after the other.
void test_a_file_within_another_is_the_same() {
  File alone, within;
  fastopt::FileOutput to_alone(alone.number()), to_within(within.number(), 192);
  for (fastopt::FileOutput* output : {&to_alone, &to_within}) {
    fastopt::ZipWriter zip(*output, "a", 64);
    zip.add("b", "content", 7);
    zip.finish();
    output->flush();
  }
  check(to_alone.offset() == alone.content().size(), "the output is not where the file ends");
  check(within.content().substr(192) == alone.content(), "the files differ");
}

void test_a_file_that_cannot_be_written_is_an_error() {
  fastopt::FileOutput output(-1);
  fastopt::ZipWriter zip(output, "a", 64);
  zip.add("b", "c", 1);
  zip.finish();
  try {
    output.flush();
  } catch (const std::system_error& error) {
    check(error.code() == std::errc::bad_file_descriptor, "another error: ", error.what());
    return;
  }
  check(false, "no error");
}

}  // namespace

std::span<const Test> torch_zip_tests() {
  static constexpr Test kTests[]{
      TEST(test_checksums_of_all_lengths_and_in_parts),
      TEST(test_a_record_that_others_write_is_as_one_written_here),
      TEST(test_a_large_record_goes_through_the_buffer_in_pieces),
      TEST(test_a_file_within_another_is_the_same),
      TEST(test_a_file_that_cannot_be_written_is_an_error),
  };
  return kTests;
}

}  // namespace core_test
