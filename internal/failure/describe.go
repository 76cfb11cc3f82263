package failure

import "strings"

// Describe words an error for a person: one sentence that begins with its class, and one
// hint. Errors carry hints within their text as well, nearer to the cause than the one that came
// with the class; the first of them is shown.
func Describe(err error) (text, hint string) {
	f := Of(err)
	text, hint = cutHints(err.Error())
	if hint == "" {
		hint = f.Hint
	}
	// A sentinel at the front often says what the class says.
	for _, said := range []string{string(f.Class) + ": ", "invalid " + string(f.Class) + ": "} {
		for strings.HasPrefix(text, said) {
			text = text[len(said):]
		}
	}
	return string(f.Class) + ": " + text, hint
}

const hintMark = " (hint: "

// cutHints takes hints in parentheses out of a text, and returns the first of them.
func cutHints(text string) (rest, first string) {
	for {
		before, after, found := strings.Cut(text, hintMark)
		end := closing(after)
		if !found || end < 0 {
			return text, first
		}
		if first == "" {
			first = after[:end]
		}
		text = before + after[end+1:]
	}
}

// closing is where the parenthesis ends that was opened before text, or -1.
func closing(text string) int {
	depth := 1
	for i, c := range text {
		switch c {
		case '(':
			depth++
		case ')':
			if depth--; depth == 0 {
				return i
			}
		}
	}
	return -1
}
