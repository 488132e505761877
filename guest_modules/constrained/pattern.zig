//! A pattern over printable ASCII, compiled to an automaton that is asked one character at a time.
//!
//! The syntax is the part of Python's `re` in which every text has an end: literals, `\` before
//! punctuation, `[a-z_]`, `(...)`, `|`, `?`, `{m}` and `{m,n}`. `*`, `+` and everything else are refused.
//!
//! It is Glushkov's construction: each character of the pattern is a position (repetitions are written
//! out), `follow` says which positions may come next, and a state is a set of positions. No position
//! is useless, so from every state the text can be brought to an end.

const std = @import("std");
const Allocator = std.mem.Allocator;

pub const max_positions = 512;
pub const Set = std.StaticBitSet(max_positions);
pub const Class = u128;

pub const Error = error{ BadPattern, OutOfMemory };

/// Index into `Pattern.states`.
pub const State = u16;
/// The state that nothing leads out of and no text reaches.
pub const dead: State = std.math.maxInt(State);
const unknown: State = dead - 1;

const Fragment = struct {
    first: Set = .empty,
    last: Set = .empty,
    nullable: bool = true,
};

const StateData = struct {
    set: Set,
    accepting: bool,
    /// Where each character leads, worked out when first asked.
    next: [128]State,
};

pub const Pattern = struct {
    allocator: Allocator,
    source: []const u8,
    at: usize = 0,
    depth: usize = 0,
    why: []const u8 = "",

    /// Position 0 is the start; the others stand for one character each.
    positions: usize = 1,
    classes: [max_positions]Class = @splat(0),
    follow: [max_positions]Set = @splat(.empty),
    accepting: Set = .empty,
    states: std.ArrayList(StateData) = .empty,

    /// Reads the pattern. After `BadPattern`, `why` and `at` say what is wrong where.
    pub fn compile(self: *Pattern) Error!void {
        const whole = try self.alternatives();
        if (self.at != self.source.len) return self.bad("a closing bracket without an opening one");
        self.follow[0] = whole.first;
        self.accepting = whole.last;
        if (whole.nullable) self.accepting.set(0);
        var start: Set = .empty;
        start.set(0);
        _ = try self.find(start);
    }

    pub fn isAccepting(self: *const Pattern, state: State) bool {
        return self.states.items[state].accepting;
    }

    /// The state after one more character, or `dead`.
    pub fn step(self: *Pattern, state: State, char: u8) Error!State {
        if (char >= 128) return dead;
        const known = self.states.items[state].next[char];
        if (known != unknown) return known;
        var reach: Set = .empty;
        var from = self.states.items[state].set.iterator(.{});
        while (from.next()) |p| reach.setUnion(self.follow[p]);
        var to: Set = .empty;
        var candidates = reach.iterator(.{});
        while (candidates.next()) |p| {
            if (self.classes[p] >> @intCast(char) & 1 != 0) to.set(p);
        }
        const found = if (to.findFirstSet() == null) dead else try self.find(to);
        self.states.items[state].next[char] = found;
        return found;
    }

    /// The only character that may come next, if there is only one and the text may not end here.
    pub fn forced(self: *Pattern, state: State) ?u8 {
        if (self.isAccepting(state)) return null;
        const class = self.allowed(state);
        return if (@popCount(class) == 1) @intCast(@ctz(class)) else null;
    }

    /// The characters that may come next.
    pub fn allowed(self: *const Pattern, state: State) Class {
        var class: Class = 0;
        var from = self.states.items[state].set.iterator(.{});
        while (from.next()) |p| {
            var next = self.follow[p].iterator(.{});
            while (next.next()) |q| class |= self.classes[q];
        }
        return class;
    }

    /// All characters of the pattern.
    pub fn alphabet(self: *const Pattern) Class {
        var class: Class = 0;
        for (self.classes[0..self.positions]) |c| class |= c;
        return class;
    }

    fn find(self: *Pattern, set: Set) Error!State {
        for (self.states.items, 0..) |state, index| {
            if (state.set.eql(set)) return @intCast(index);
        }
        if (self.states.items.len == unknown) return error.OutOfMemory;
        const ends = set.intersectWith(self.accepting).findFirstSet() != null;
        try self.states.append(self.allocator, .{ .set = set, .accepting = ends, .next = @splat(unknown) });
        return @intCast(self.states.items.len - 1);
    }

    // --- reading ---------------------------------------------------------------------------------

    fn bad(self: *Pattern, why: []const u8) Error {
        self.why = why;
        return error.BadPattern;
    }

    fn peek(self: *const Pattern) ?u8 {
        return if (self.at < self.source.len) self.source[self.at] else null;
    }

    fn alternatives(self: *Pattern) Error!Fragment {
        var all = try self.sequence();
        while (self.peek() == '|') {
            self.at += 1;
            const other = try self.sequence();
            all.first.setUnion(other.first);
            all.last.setUnion(other.last);
            all.nullable = all.nullable or other.nullable;
        }
        return all;
    }

    fn sequence(self: *Pattern) Error!Fragment {
        var all: Fragment = .{};
        while (self.peek()) |char| {
            if (char == '|' or char == ')') break;
            all = self.join(all, try self.repeated());
        }
        return all;
    }

    fn join(self: *Pattern, a: Fragment, b: Fragment) Fragment {
        var ends = a.last.iterator(.{});
        while (ends.next()) |p| self.follow[p].setUnion(b.first);
        return .{
            .first = if (a.nullable) a.first.unionWith(b.first) else a.first,
            .last = if (b.nullable) b.last.unionWith(a.last) else b.last,
            .nullable = a.nullable and b.nullable,
        };
    }

    fn repeated(self: *Pattern) Error!Fragment {
        const start = self.at;
        var all = try self.atom();
        var least: usize = 1;
        var most: usize = 1;
        if (self.peek() == '?') {
            self.at += 1;
            least = 0;
        } else if (self.peek() == '{') {
            self.at += 1;
            least = try self.number();
            most = least;
            if (self.peek() == ',') {
                self.at += 1;
                most = try self.number();
            }
            if (self.peek() != '}') return self.bad("a repetition is {m} or {m,n}");
            self.at += 1;
            if (most == 0 or most < least or most > max_positions) return self.bad("a repetition has a wrong count");
        }
        const end = self.at;
        if (least == 0) all.nullable = true;
        // Each further copy is read anew, so that it gets positions of its own.
        for (1..most) |copy| {
            self.at = start;
            var next = try self.atom();
            if (copy >= least) next.nullable = true;
            all = self.join(all, next);
        }
        self.at = end;
        return all;
    }

    fn number(self: *Pattern) Error!usize {
        var value: usize = 0;
        const start = self.at;
        while (self.peek()) |char| : (self.at += 1) {
            if (char < '0' or char > '9') break;
            value = @min(value * 10 + (char - '0'), max_positions + 1);
        }
        if (self.at == start) return self.bad("a repetition is {m} or {m,n}");
        return value;
    }

    fn atom(self: *Pattern) Error!Fragment {
        const char = self.peek() orelse return self.bad("the pattern ends too early");
        self.at += 1;
        switch (char) {
            '(' => {
                self.depth += 1;
                if (self.depth > 32) return self.bad("brackets are nested too deeply");
                const inner = try self.alternatives();
                if (self.peek() != ')') return self.bad("a bracket is not closed");
                self.at += 1;
                self.depth -= 1;
                return inner;
            },
            '[' => return self.position(try self.bracket()),
            '*', '+' => return self.bad("a text must have an end: write {m,n}"),
            ')', ']', '{', '}', '?', '.', '^', '$', '|' => return self.bad("write a backslash before this character"),
            else => {
                self.at -= 1;
                return self.position(@as(Class, 1) << @intCast(try self.literal()));
            },
        }
    }

    fn literal(self: *Pattern) Error!u8 {
        var char = self.peek() orelse return self.bad("the pattern ends too early");
        self.at += 1;
        if (char == '\\') {
            char = self.peek() orelse return self.bad("the pattern ends too early");
            self.at += 1;
            if (std.ascii.isAlphanumeric(char)) return self.bad("a backslash stands only before punctuation");
        }
        if (char < 0x20 or char > 0x7E) return self.bad("only printable ASCII is allowed");
        return char;
    }

    fn bracket(self: *Pattern) Error!Class {
        var found: Class = 0;
        if (self.peek() == '^') return self.bad("[^...] is not supported");
        while (self.peek()) |next| {
            if (next == ']') {
                if (found == 0) return self.bad("a class is empty");
                self.at += 1;
                return found;
            }
            const low = try self.literal();
            var high = low;
            if (self.peek() == '-' and self.at + 1 < self.source.len and self.source[self.at + 1] != ']') {
                self.at += 1;
                high = try self.literal();
                if (high < low) return self.bad("a range runs backwards");
            }
            for (low..@as(usize, high) + 1) |char| found |= @as(Class, 1) << @intCast(char);
        }
        return self.bad("a class is not closed");
    }

    fn position(self: *Pattern, chars: Class) Error!Fragment {
        if (self.positions == max_positions) return self.bad("the pattern is too long");
        const p = self.positions;
        self.positions += 1;
        self.classes[p] = chars;
        var one: Set = .empty;
        one.set(p);
        return .{ .first = one, .last = one, .nullable = false };
    }
};
