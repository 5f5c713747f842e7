// Products of groups of warps, PTX's `wgmma`: what a warp starts is done when it waits for it, from operands in shared memory or in
// registers as they are then.
#pragma once

#include "engine.hpp"

namespace emulator {
namespace {

// An operand of a group's product in shared memory, as PTX ISA, "wgmma", has it for swizzling by 128 bytes. In units of bytes the
// canonical layouts are, of an operand whose terms are neighbours, rows ((8, n)) : ((128, stride)) and of one whose
// rows or columns are, columns ((128, n)) : ((1, leading)) and terms ((8, 2)) : ((128, stride)); then bits 4 to 6 of an address are
// changed by bits 7 to 9.
class SharedOperand {
  public:
    explicit SharedOperand(u64 descriptor)
        : base_(field(descriptor, 0)), leading_(field(descriptor, 16)), stride_(field(descriptor, 32)) {
        constexpr u64 fields = 0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 1ull << 62;
        if ((descriptor & ~fields) != 0 || (descriptor >> 62) != 1) fail("a descriptor not of tiles swizzled by 128 bytes");
        if (base_ / 128 % 8 != 0) fail("a descriptor of a tile that does not begin at a multiple of 1024 bytes");
    }

    // Terms `8 · piece` to `8 · piece + 8` of a row.
    void row(u32 row, u32 piece, float (&to)[8]) const {
        load(base_ + row / 8 * stride_ + row % 8 * 128 + piece * 16, to);
    }

    // Columns `8 · piece` to `8 · piece + 8` of a term.
    void term(u32 term, u32 piece, float (&to)[8]) const {
        load(base_ + term / 8 * stride_ + term % 8 * 128 + piece / 8 * leading_ + piece % 8 * 16, to);
    }

  private:
    static u32 field(u64 descriptor, u32 from) { return static_cast<u32>(descriptor >> from & 0x3FFF) << 4; }

    static void load(u32 address, float (&to)[8]) {
        address ^= (address >> 7 & 7) << 4;
        const u8* at = engine().shared.at(address);
        if (address + 16 > Shared::MOST || !engine().shared.holds(at, 16)) {
            fail("a group's product reads outside of dynamic shared memory");
        }
        if (engine().unpublished[address / 16]) fail("a group's product reads what was not published to it");
        u16 elements[8];
        std::memcpy(elements, at, sizeof elements);
        for (u32 i = 0; i < 8; ++i) to[i] = to_float(bf16{elements[i]});
    }

    u32 base_, leading_, stride_;
};

// A warp's 16 rows of a group's product. A and C are of the fragments of `multiply`, N / 8 of them beside each other.
void multiply_rows(const Product& product, u32 first_row) {
    const GroupProduct& what = product.what;
    const SharedOperand right(what.b);
    static float a[16][16], b[16][256];
    if (what.weights == nullptr) {
        const SharedOperand left(what.a);
        for (u32 row = 0; row < 16; ++row) {
            for (u32 piece = 0; piece < 2; ++piece) {
                float terms[8];
                left.row(first_row + row, piece, terms);
                std::memcpy(a[row] + 8 * piece, terms, sizeof terms);
            }
        }
        for (u32 column = 0; column < what.columns; ++column) {
            for (u32 piece = 0; piece < 2; ++piece) {
                float terms[8];
                right.row(column, piece, terms);
                for (u32 i = 0; i < 8; ++i) b[8 * piece + i][column] = terms[i];
            }
        }
    } else {
        for (u32 lane = 0; lane < LANES; ++lane) {
            const u32 g = lane / 4, t = lane % 4;
            const u32(&words)[4] = product.weights[lane];
            if (std::memcmp(words, product.at[lane], sizeof words) != 0) {
                fail("the registers of a group's product changed before the wait for it");
            }
            for (u32 i = 0; i < 4; ++i) {
                for (u32 half = 0; half < 2; ++half) a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = half_of(words[i], half);
            }
        }
        for (u32 term = 0; term < 16; ++term) {
            for (u32 piece = 0; piece < what.columns / 8; ++piece) {
                float columns[8];
                right.term(term, piece, columns);
                std::memcpy(b[term] + 8 * piece, columns, sizeof columns);
            }
        }
    }
    for (u32 lane = 0; lane < LANES; ++lane) {
        const u32 g = lane / 4, t = lane % 4;
        for (u32 n = 0; n < what.columns / 8; ++n) {
            for (u32 i = 0; i < 4; ++i) {
                float& c = product.c[lane][4 * n + i];
                double sum = what.add ? c : 0.0;
                for (u32 k = 0; k < 16; ++k) sum += static_cast<double>(a[g + i / 2 * 8][k]) * b[k][8 * n + 2 * t + i % 2];
                c = static_cast<float>(sum);
            }
        }
    }
}

// Whether the other warps of the group did the same, as far as they got.
void step(Warp& warp, u64 a, u64 b) {
    Engine& e = engine();
    const auto number = static_cast<std::size_t>(&warp - e.warps.data());
    if (e.warps.size() % GROUP_WARPS != 0) fail("a group of fewer than four warps multiplies");
    Group& group = e.groups[number / GROUP_WARPS];
    const Step own = {warp.what, warp.site, a, b};
    if (warp.steps == group.steps.size()) group.steps.push_back(own);
    const Step& first = group.steps[warp.steps++];
    if (first.what != own.what || !same(first.site, own.site) || first.a != a || first.b != b) {
        fail("warps of a group diverge: " + text(own.site) + " meets " + text(first.site));
    }
}

void start_product(Warp& warp) {
    const auto& what = *static_cast<const GroupProduct*>(warp.operands[0].in[0]);
    step(warp, what.a, what.b);
    if (!warp.begun) fail("a group's product without a fence before it");
    Product& product = warp.products.emplace_back();
    product.what = what;
    product.batch = warp.batches;
    for (u32 lane = 0; lane < LANES; ++lane) {
        const auto& own = *static_cast<const GroupProduct*>(warp.operands[lane].in[0]);
        if (own.a != what.a || own.b != what.b || own.add != what.add) fail("lanes have other operands of a group's product");
        product.c[lane] = static_cast<float*>(warp.operands[lane].out);
        product.at[lane] = own.weights;
        if (own.weights != nullptr) std::memcpy(product.weights[lane], own.weights, sizeof product.weights[lane]);
    }
}

void wait_for_products(Warp& warp) {
    const u64 pending = warp.operands[0].number;
    step(warp, pending, 0);
    warp.begun = false;
    const auto first_row = static_cast<u32>((&warp - engine().warps.data()) % GROUP_WARPS) * 16;
    const auto due = [&](const Product& product) { return product.batch + pending < warp.batches; };
    for (const Product& product : warp.products) {
        if (due(product)) multiply_rows(product, first_row);
    }
    std::erase_if(warp.products, due);
}

} // namespace
} // namespace emulator
