//! Output that always matches a grammar, whatever the seed and the temperature.
//!
//! The grammar is a pattern over characters (pattern.zig). In each state the tokens that keep the text
//! inside it are allowed and nothing else; where only one character can follow, it is written without
//! asking the model. The token is drawn in one of two ways, to show both: by this guest from the
//! logits it reads, or by the engine with the allowed tokens as a mask.

const std = @import("std");
const realm = @import("realm");
const pattern = @import("pattern.zig");

const allocator = std.heap.wasm_allocator;
const default_grammar = std.mem.trimEnd(u8, @embedFile("grammar.txt"), "\n");

const Failure = error{ Refused, OutOfMemory, Host };

/// The code to return after `error.Host` or `error.Refused`.
var failure: i32 = 0;

const Sampler = enum { guest, engine, both };

const Options = struct {
    prompt: []const u8 = "Invent a person. Answer with a JSON object: name, age, city and two things the person likes.",
    grammar: []const u8 = default_grammar,
    temperature: f32 = 0.8,
    sampler: Sampler = .both,
    adapter: []const u8 = "",
};

export fn realm_abi_version() i32 {
    return realm.abi_version;
}

export fn run() i32 {
    generate() catch |e| switch (e) {
        error.OutOfMemory => {
            say(realm.LOG_ERROR, "the guest's memory may not grow further", .{});
            return realm.err.limit;
        },
        error.Refused, error.Host => return failure,
    };
    return 0;
}

fn say(level: u32, comptime format: []const u8, arguments: anytype) void {
    var line: [256]u8 = undefined;
    const text = std.fmt.bufPrint(&line, format, arguments) catch line[0..];
    _ = realm.log(level, text.ptr, @intCast(text.len));
}

fn refuse(code: i32, comptime format: []const u8, arguments: anytype) Failure {
    say(realm.LOG_ERROR, format, arguments);
    failure = code;
    return error.Refused;
}

/// A host function's result, as a length or a handle.
fn ok(code: i32) Failure!u32 {
    if (code < 0) {
        failure = code;
        return error.Host;
    }
    return @intCast(code);
}

fn readOptions() Failure!Options {
    const input = try allocator.alloc(u8, try ok(realm.input_len()));
    // An empty slice's pointer points nowhere, and the host would refuse it.
    if (input.len == 0) return .{};
    _ = try ok(realm.input_read(0, input.ptr, @intCast(input.len)));
    const text = std.mem.trim(u8, input, " \t\r\n");
    if (text.len == 0) return .{};
    if (text[0] != '{') return .{ .prompt = input };
    const options = std.json.parseFromSliceLeaky(Options, allocator, text, .{ .ignore_unknown_fields = true }) catch |e|
        return refuse(realm.err.invalid_argument, "input: not a JSON object with the options of this guest ({t})", .{e});
    if (!(options.temperature >= 0 and options.temperature <= 100))
        return refuse(realm.err.invalid_argument, "temperature: must be a number from 0 to 100", .{});
    return options;
}

fn tokenize(text: []const u8, flags: u32) Failure![]u32 {
    if (text.len == 0) return &.{};
    var tokens = try allocator.alloc(u32, text.len + 16);
    var count = try ok(realm.tokenize(text.ptr, @intCast(text.len), flags, tokens.ptr, @intCast(tokens.len)));
    if (count > tokens.len) {
        tokens = try allocator.alloc(u32, count);
        count = try ok(realm.tokenize(text.ptr, @intCast(text.len), flags, tokens.ptr, @intCast(tokens.len)));
    }
    return tokens[0..count];
}

fn detokenize(tokens: []const u32, flags: u32, buffer: *[]u8) Failure![]const u8 {
    while (true) {
        const size = try ok(realm.detokenize(0, tokens.ptr, @intCast(tokens.len), flags, buffer.ptr, @intCast(buffer.len)));
        if (size <= buffer.len) return buffer.*[0..size];
        buffer.* = try allocator.alloc(u8, size);
    }
}

fn promptTokens(prompt: []const u8, model: realm.ModelInfo) Failure![]u32 {
    if (model.flags & realm.MODEL_CHAT_TEMPLATE == 0) return tokenize(prompt, 0);
    const message = .{.{ .role = "user", .content = prompt }};
    const messages = try std.json.Stringify.valueAlloc(allocator, message, .{});
    var room: u32 = @intCast(messages.len * 2 + 1024);
    while (true) {
        const out = try allocator.alloc(u8, room);
        const size = try ok(realm.chat_template(messages.ptr, @intCast(messages.len), realm.CHAT_GENERATE, out.ptr, room));
        if (size <= room) return tokenize(out[0..size], realm.TOKENIZE_SPECIAL);
        room = size;
    }
}

/// The tokens whose text is printable ASCII: no other can be part of a match.
const Vocabulary = struct {
    const Entry = struct { token: u32, start: u32, size: u32 };

    entries: std.ArrayList(Entry) = .empty,
    /// All texts, one after another.
    text: std.ArrayList(u8) = .empty,
    /// Index into `entries` for each token, or `none`.
    index: []u32,

    const none = std.math.maxInt(u32);
    const chunk = 1024;

    /// Asks for many texts in one call, with the end-of-sequence token's text between them.
    fn load(model: realm.ModelInfo) Failure!Vocabulary {
        var self: Vocabulary = .{ .index = try allocator.alloc(u32, model.vocab_size) };
        @memset(self.index, none);
        var buffer = try allocator.alloc(u8, 32 * chunk);
        if (model.eos < 0) return refuse(realm.err.not_supported, "the model has no end-of-sequence token", .{});
        const eos: u32 = @intCast(model.eos);
        const between = try allocator.dupe(u8, try detokenize(&.{eos}, realm.DETOKENIZE_SPECIAL, &buffer));
        if (between.len == 0) return refuse(realm.err.not_supported, "the end-of-sequence token has no text", .{});

        var ids: [2 * chunk + 1]u32 = undefined;
        var first: u32 = 0;
        while (first < model.vocab_size) : (first += chunk) {
            const last = @min(first + chunk, model.vocab_size);
            ids[0] = eos;
            for (first..last, 0..) |token, i| {
                ids[2 * i + 1] = @intCast(token);
                ids[2 * i + 2] = eos;
            }
            const all = try detokenize(ids[0 .. 2 * (last - first) + 1], realm.DETOKENIZE_SPECIAL, &buffer);
            var rest = all[between.len..];
            for (first..last) |token| {
                if (token == eos) {
                    rest = rest[2 * between.len ..];
                    continue;
                }
                const size = std.mem.indexOf(u8, rest, between) orelse
                    return refuse(realm.err.not_supported, "the vocabulary's texts cannot be told apart", .{});
                try self.add(@intCast(token), rest[0..size]);
                rest = rest[size + between.len ..];
            }
        }
        try self.dropSpecial();
        return self;
    }

    fn add(self: *Vocabulary, token: u32, text: []const u8) Failure!void {
        if (text.len == 0) return;
        for (text) |char| if (char < 0x20 or char > 0x7E) return;
        const start: u32 = @intCast(self.text.items.len);
        try self.text.appendSlice(allocator, text);
        try self.entries.append(allocator, .{ .token = token, .start = start, .size = @intCast(text.len) });
    }

    /// Leaves out special tokens: written without DETOKENIZE_SPECIAL they have no text.
    fn dropSpecial(self: *Vocabulary) Failure!void {
        const ids = try allocator.alloc(u32, self.entries.items.len + 1);
        // Some tokenizers drop a text's first space, so each question begins with a token without one.
        ids[0] = for (self.entries.items) |entry| {
            if (entry.size == 1 and self.text.items[entry.start] == '"') break entry.token;
        } else return refuse(realm.err.not_supported, "the vocabulary has no token for '\"'", .{});
        const all = self.entries.items;
        var kept: usize = 0;
        var first: usize = 0;
        while (first < all.len) {
            var last = @min(first + chunk, all.len);
            while (!try plain(all[first..last], ids)) {
                if (last - first == 1) break;
                last = first + (last - first) / 2;
            } else {
                std.mem.copyForwards(Entry, all[kept..], all[first..last]);
                kept += last - first;
            }
            first = last;
        }
        self.entries.shrinkRetainingCapacity(kept);
        for (self.entries.items, 0..) |entry, i| self.index[entry.token] = @intCast(i);
    }

    fn plain(entries: []const Entry, ids: []u32) Failure!bool {
        var expected: usize = 1;
        for (entries, ids[1 .. entries.len + 1]) |entry, *id| {
            id.* = entry.token;
            expected += entry.size;
        }
        var nothing: [1]u8 = undefined;
        return try ok(realm.detokenize(0, ids.ptr, @intCast(entries.len + 1), 0, &nothing, 0)) == expected;
    }

    fn of(self: *const Vocabulary, token: u32) []const u8 {
        const entry = self.entries.items[self.index[token]];
        return self.text.items[entry.start..][0..entry.size];
    }

    /// Every character of the pattern must be a token, or a text could get stuck.
    fn check(self: *const Vocabulary, alphabet: pattern.Class) Failure!void {
        var single: pattern.Class = 0;
        for (self.entries.items) |entry| {
            if (entry.size == 1) single |= @as(pattern.Class, 1) << @intCast(self.text.items[entry.start]);
        }
        const missing = alphabet & ~single;
        if (missing != 0)
            return refuse(realm.err.not_supported, "the vocabulary has no token for '{c}'", .{@as(u8, @intCast(@ctz(missing)))});
    }
};

/// The tokens allowed in each state, as bits; worked out when a state is first met.
const Masks = struct {
    known: std.AutoHashMapUnmanaged(pattern.State, []u32) = .empty,

    fn of(self: *Masks, grammar: *pattern.Pattern, vocabulary: *const Vocabulary, model: realm.ModelInfo, state: pattern.State) Failure![]u32 {
        if (self.known.get(state)) |mask| return mask;
        const mask = try allocator.alloc(u32, model.mask_words);
        @memset(mask, 0);
        for (vocabulary.entries.items) |entry| {
            if (try walk(grammar, state, vocabulary.text.items[entry.start..][0..entry.size]) != pattern.dead)
                mask[entry.token / 32] |= bit(entry.token);
        }
        const eos: u32 = @intCast(model.eos);
        if (grammar.isAccepting(state)) mask[eos / 32] |= bit(eos);
        try self.known.put(allocator, state, mask);
        return mask;
    }
};

fn bit(token: u32) u32 {
    return @as(u32, 1) << @intCast(token % 32);
}

fn walk(grammar: *pattern.Pattern, start: pattern.State, text: []const u8) Failure!pattern.State {
    var state = start;
    for (text) |char| {
        state = grammar.step(state, char) catch return error.OutOfMemory;
        if (state == pattern.dead) break;
    }
    return state;
}

/// This guest's own sampler: softmax over the allowed tokens at a temperature, then one draw.
fn draw(logits: []const f32, mask: []const u32, temperature: f32) u32 {
    var best: ?u32 = null;
    for (logits, 0..) |logit, i| {
        const token: u32 = @intCast(i);
        if (mask[token / 32] & bit(token) == 0) continue;
        if (best == null or logit > logits[best.?]) best = token;
    }
    if (temperature == 0) return best.?;
    const top: f64 = logits[best.?];
    var total: f64 = 0;
    for (logits, 0..) |logit, i| {
        const token: u32 = @intCast(i);
        if (mask[token / 32] & bit(token) != 0) total += @exp((logit - top) / temperature);
    }
    var left = @as(f64, @floatFromInt(realm.random())) / 0x1p63 * total;
    for (logits, 0..) |logit, i| {
        const token: u32 = @intCast(i);
        if (mask[token / 32] & bit(token) == 0) continue;
        left -= @exp((logit - top) / temperature);
        if (left < 0) return token;
    }
    // Only rounding leads here.
    return best.?;
}

fn generate() Failure!void {
    var model: realm.ModelInfo = .{};
    _ = try ok(realm.model_info(&model));
    const options = try readOptions();
    const grammar = try allocator.create(pattern.Pattern);
    grammar.* = .{ .allocator = allocator, .source = options.grammar };
    grammar.compile() catch |e| switch (e) {
        error.OutOfMemory => return error.OutOfMemory,
        error.BadPattern => return refuse(realm.err.invalid_argument, "grammar: at character {d}: {s}", .{ grammar.at, grammar.why }),
    };
    const vocabulary = try Vocabulary.load(model);
    try vocabulary.check(grammar.alphabet());

    var masks: Masks = .{};
    var pending: std.ArrayList(u32) = .empty;
    try pending.appendSlice(allocator, try promptTokens(options.prompt, model));
    if (pending.items.len == 0) return refuse(realm.err.invalid_argument, "prompt: is empty", .{});
    const seq: i32 = @intCast(try ok(realm.seq_new()));
    if (options.adapter.len > 0) {
        const code = realm.lora_apply(seq, options.adapter.ptr, @intCast(options.adapter.len));
        if (code < 0) {
            // The host's line before this one says why, and stays the run's last error.
            say(realm.LOG_WARNING, "adapter: {s}: cannot be used", .{options.adapter});
            failure = code;
            return error.Host;
        }
    }
    const logits = try allocator.alloc(f32, model.vocab_size);
    var state: pattern.State = 0;
    var draws = [2]u32{ 0, 0 };
    var forced: usize = 0;
    var text: std.ArrayList(u8) = .empty;

    while (true) {
        text.clearRetainingCapacity();
        while (grammar.forced(state)) |char| {
            try text.append(allocator, char);
            state = try walk(grammar, state, &.{char});
        }
        if (text.items.len > 0) {
            forced += text.items.len;
            _ = try ok(realm.emit(text.items.ptr, @intCast(text.items.len)));
            try pending.appendSlice(allocator, try tokenize(text.items, 0));
        }
        if (grammar.allowed(state) == 0) break;

        const mask = try masks.of(grammar, &vocabulary, model, state);
        const by_engine = switch (options.sampler) {
            .guest => false,
            .engine => true,
            .both => (draws[0] + draws[1]) % 2 == 1,
        };
        var token: u32 = undefined;
        if (by_engine) {
            const sampling: realm.Sampling = .{
                .temperature = options.temperature,
                .mask = realm.ptr(mask.ptr),
                .mask_words = model.mask_words,
            };
            token = try ok(realm.forward(seq, pending.items.ptr, @intCast(pending.items.len), &sampling, null));
        } else {
            _ = try ok(realm.forward(seq, pending.items.ptr, @intCast(pending.items.len), null, null));
            _ = try ok(realm.logits_read(seq, logits.ptr, model.vocab_size));
            token = draw(logits, mask, options.temperature);
        }
        draws[@intFromBool(by_engine)] += 1;
        if (token == model.eos) break;
        const piece = vocabulary.of(token);
        state = try walk(grammar, state, piece);
        _ = try ok(realm.emit(piece.ptr, @intCast(piece.len)));
        pending.clearRetainingCapacity();
        try pending.append(allocator, token);
    }
    say(realm.LOG_INFO, "draws by the guest {d}, by the engine {d}; characters without a draw {d}", .{ draws[0], draws[1], forced });
}
